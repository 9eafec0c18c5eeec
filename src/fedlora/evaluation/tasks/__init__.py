"""Standard tasks of lm-evaluation-harness, answered by our engine; the only package that knows that library."""

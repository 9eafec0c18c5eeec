"""Many runs as one result: the experiment, its budget, its runs, its tables and figures."""

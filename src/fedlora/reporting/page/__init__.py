"""report.html: one file that needs no network, made of the same findings as the other forms of a result."""

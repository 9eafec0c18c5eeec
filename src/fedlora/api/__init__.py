"""The entry point for Python: the functions and classes of `fedlora.__all__`, thin over configurations and stages."""

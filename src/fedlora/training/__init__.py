"""One run in the process that trains it."""

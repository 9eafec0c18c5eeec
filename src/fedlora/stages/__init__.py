"""One program per module: each reads what the one before left and writes its own."""

"""One federated method per file."""

"""A run in experiment trackers: what metrics.jsonl has of it, its configuration, its table of rounds, its report."""

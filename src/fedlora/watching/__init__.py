"""A run watched from its files, while another process trains it."""

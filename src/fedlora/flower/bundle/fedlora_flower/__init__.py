"""The two shims that Flower ships."""

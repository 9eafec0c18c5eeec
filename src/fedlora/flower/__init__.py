"""The federation across machines, carried by Flower: server, nodes, their commands and configuration."""

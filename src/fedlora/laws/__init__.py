"""The laws that a federated method keeps, tried without a language model."""

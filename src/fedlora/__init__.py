"""Federated LoRA fine-tuning of language models, simulated on one machine or run across many."""

__version__ = "0.1.0"

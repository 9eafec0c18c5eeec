"""The LLM judge: both orders, one verdict per sample, every verdict kept."""

"""The fast path through decoders of Llama's kind on a CPU."""

"""Everything that touches a language model: the only package that imports transformers or peft."""

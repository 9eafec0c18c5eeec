"""One question to several models, whose answers stream side by side."""

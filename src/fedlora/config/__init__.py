"""Configuration models, one per stage: the flags, the YAML file and the record of a run are the same thing."""

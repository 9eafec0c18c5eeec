"""What a run leaves on disk: the only package that writes under model_dir."""

"""The engines that carry out rounds."""

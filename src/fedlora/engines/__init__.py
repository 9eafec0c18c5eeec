"""Who carries out the rounds."""

"""Models of transformers, loaded straight into RAM."""

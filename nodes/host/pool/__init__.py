"""Models that stay loaded when their workflow is left, and are given back where it is asked for
again."""

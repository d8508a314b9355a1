"""Real data for meta tensors, and the same dispatch again afterwards."""

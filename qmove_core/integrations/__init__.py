"""What accelerate and diffusers keep of a model, and where."""

"""Hooks of accelerate and diffusers that park models between their forwards."""

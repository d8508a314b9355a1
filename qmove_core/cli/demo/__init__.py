"""What `qmove demo` runs and draws."""

"""What the frontend is told."""

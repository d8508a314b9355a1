"""What happens before and after each node of a prompt."""

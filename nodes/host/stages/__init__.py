"""What happens around each node of a prompt: room is made, models come home, requests wait their turn."""

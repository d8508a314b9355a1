"""What happens around each node: room is made, models come home, requests wait their turn."""

"""What the frontend shows: the state, the last run, the version, and when to send them."""

"""Park, restore, move and swap: the requests, their plans, and how a parked model wakes."""

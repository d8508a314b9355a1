"""What a model holds: the walk, the inventory, holders, tensor kinds. See README.md."""

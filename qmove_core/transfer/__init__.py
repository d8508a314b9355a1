"""One move as one transaction: copies, proof, commit and rollback."""

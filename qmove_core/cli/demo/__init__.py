"""`qmove demo`: two acts with a real model, in which every figure is measured while it runs."""

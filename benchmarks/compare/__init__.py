"""qmove beside its peers: the same models, the same swaps, one page of results.

`make bench` runs it.
"""

"""`make gpu-check`: proves qmove on this machine's GPU in about eight minutes.

Each step is a process of its own with a time limit, so that one that hangs or dies costs only
itself. Without a GPU the same steps run over the simulated one, which shows that they work.
"""

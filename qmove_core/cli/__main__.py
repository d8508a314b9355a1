"""`python -m qmove_core.cli`."""

from .app import main

main()

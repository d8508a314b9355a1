"""Raises MissingDependency where PyTorch is missing or too old. It is imported before the rest.

PyTorch is no dependency of the package, so that pip never replaces the build that the user chose
for a GPU.
"""

from __future__ import annotations

from .base_errors import MissingDependency

_ADVICE = (
    "qmove needs PyTorch 2.6 or newer. "
    "Install the build for your GPU: https://pytorch.org/get-started/locally"
)

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise MissingDependency(f"PyTorch is not installed. {_ADVICE}") from None

if torch.__version__ < "2.6":
    raise MissingDependency(f"PyTorch {torch.__version__} is installed. {_ADVICE}")

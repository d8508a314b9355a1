"""What a tensor kind may need besides having its bytes moved."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..holdings import Inventory


class Kind:
    """One family of tensors. The defaults are those of plain tensors, which need nothing.

    Attributes:
        module: the package the kind comes from; the kind is asked only once that is imported.
            Empty: always.
    """

    module = ""

    def process_wide_tensors(self) -> Iterable[torch.Tensor]:
        """Tensors that the package shares among all models. They never move."""
        return ()

    def obstacles(self, inventory: Inventory, device: torch.device) -> list[tuple[str, str]]:
        """(name, reason) of what would not run on `device` if the model were moved there."""
        return []

    def refresh(self, inventory: Inventory) -> None:
        """Brings whatever depends on the place in line with where the bytes are now.

        Called after the bytes have moved, and again after a rollback has moved them back; so it
        depends only on where they are, never on where they came from.
        """

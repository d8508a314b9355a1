"""Stands in for a package that ComfyUI imports at start and no test uses: every name in it exists,
as an empty class.

torchvision, torchaudio, kornia and spandrel need a build of torch that fits them; a CPU build on a
test machine has none.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


class _AnyClass(type):
    """A class with every attribute: transformers reads members of torchvision's enums while it is
    imported."""

    def __getattr__(cls, name: str) -> object:
        return _made_up(cls, name)


class _Standin(ModuleType):
    def __getattr__(self, name: str) -> object:
        return _made_up(self, name)


def _made_up(owner: object, name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    value = _AnyClass(name, (), {})
    setattr(owner, name, value)
    return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self._prefix = f"{package}."

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.startswith(self._prefix)
            else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Standin(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for(package: str) -> None:
    """Makes the package that is being imported, and all its submodules, stand-ins."""
    sys.modules[package].__class__ = _Standin
    sys.meta_path.append(_Finder(package))

"""What happens when certain packages are imported while the simulation is active.

``torch.cuda`` finds the functions of a CUDA build in ``torch._C`` before its own code runs, so that
this code, which decides by what is there, takes its CUDA branches. Packages with compiled CUDA
kernels find no CUDA device for as long as their import lasts: they then choose the kernels that
work on any device, which the simulated ones serve.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# bitsandbytes would load libbitsandbytes_cuda*.so and register kernels that call it. Of quanto only
# the one package that chooses extensions: the whole of it imports transformers, which remembers
# whether it saw a CUDA device.
KERNEL_PACKAGES = ("bitsandbytes", "optimum.quanto.library.extensions")


class _WrappedLoader(Loader):
    """Runs the module's own loader inside ``around``."""

    def __init__(self, inner: Loader, around: Callable[[Callable[[], None]], None]) -> None:
        self._inner = inner
        self._around = around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._around(lambda: self._inner.exec_module(module))

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)  # get_source, get_resource_reader and the like


def _with_cuda_bindings(run: Callable[[], None]) -> None:
    from simcuda import torch_cuda

    torch_cuda.install_bindings()
    run()


def _without_cuda(run: Callable[[], None]) -> None:
    """Runs an import with ``torch.cuda.is_available()`` answering False, in this whole process,
    until it is done."""
    import torch

    before = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        run()
    finally:
        torch.cuda.is_available = before


class _Finder(MetaPathFinder):
    """Wraps the loaders of the modules above; every other import passes by."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        around = _with_cuda_bindings if fullname == "torch.cuda" else None
        if fullname in KERNEL_PACKAGES:
            around = _without_cuda
        if around is None or fullname in self._busy:
            return None
        self._busy.add(fullname)  # the search below comes back here
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _WrappedLoader(spec.loader, around)
        return spec


def install() -> None:
    """Starts watching imports."""
    sys.meta_path.insert(0, _Finder())

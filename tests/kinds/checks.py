"""The list of checks: what must hold for a model of whatever kind. Each is a function of a `Case`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.errors import CannotMove, DtypeCastRefused, MetaTensorsPresent, NotEnoughMemory
from qmove_core.parking import streaming
from qmove_core.transfer import copies
from tests.builders.device import GPU
from tests.builders.snapshots import contents, snapshot, traces
from tests.kinds.attributes import attributes_of
from tests.kinds.kind import Kind, first_line


@dataclass(frozen=True)
class Case:
    """A kind that is checked, on an empty device."""

    kind: Kind
    gpu: GPU
    folder: Path

    def built(self) -> Any:
        """The model, after one forward: some libraries lay their tensors out anew in the first."""
        model = self.kind.model()
        if not self.kind.kernels:
            self.kind.outputs(model)
        assert qmove.inventory(model).by_device.get("cuda:0", 0) > 0
        return model


def steady(case: Case, model: Any) -> dict[str, Any]:
    """A snapshot without what the library makes anew in each forward."""
    return {
        name: facts for name, facts in snapshot(model).items() if not name.endswith(renewed(case))
    }


def movable_bytes(model: Any) -> int:
    held = qmove.inventory(model)
    return sum(h.nbytes for h in held.holdings if h.device.type == "cuda" and not stays(held, h))


def stays(held: Any, holding: Any) -> bool:
    return holding.storage._cdata in held.addressed


def parked(case: Case) -> None:
    """Park leaves 0 bytes on the device; what cannot be parked rightly stays, by name."""
    model = case.built()
    leaves, before = movable_bytes(model), case.gpu.allocated()
    result = qmove.park(model)
    assert result.nbytes == leaves > 0
    assert case.gpu.allocated() == before - leaves
    assert qmove.is_parked(model)
    named = [straggler.name for straggler in result.stragglers]
    for part in case.kind.stays:
        assert any(part in name for name in named), (part, named)
    if not case.kind.stays:
        assert named == []
        assert qmove.inventory(model).by_device.get("cuda:0") is None
        return
    assert all(any(part in name for part in case.kind.stays) for name in named), named
    qmove.restore(model)
    with pytest.raises(CannotMove) as raised:
        qmove.park(model, strict=True)
    assert any(part in str(raised.value) for part in case.kind.stays)


def restored(case: Case) -> None:
    """Restore gives the same bytes in the same tensor objects, twice, and once to a fresh place."""
    model = case.built()
    before, allocated = snapshot(model), case.gpu.allocated()
    for _ in range(2):
        qmove.park(model)
        qmove.restore(model)
        assert snapshot(model) == before
        assert case.gpu.allocated() == allocated


def attributes(case: Case) -> None:
    """Every attribute of every module, tensor and object between them is the same again."""
    model = case.built()
    before, objects = traces_of(case, model), attributes_of(model)
    qmove.park(model)
    qmove.restore(model)
    assert traces_of(case, model) == before
    assert attributes_of(model) == objects


def traces_of(case: Case, model: Any) -> Any:
    """Without the attributes that the library sets anew in each forward."""
    return [
        tuple(
            {name: it for name, it in part.items() if not f".{name}".endswith(renewed(case))}
            if isinstance(part, dict) and all(isinstance(name, str) for name in part)
            else part
            for part in trace
        )
        for trace in traces(model)
    ]


def renewed(case: Case) -> tuple[str, ...]:
    return case.kind.renewed or ("\0",)


def aliases(case: Case) -> None:
    """What shares a storage shares it again: a second module, a view, a tensor in a list."""
    model = case.built()
    held = qmove.inventory(model)
    views = [
        torch.empty(0, dtype=torch.uint8, device=h.device).set_(h.storage, 0, (h.nbytes,), (1,))
        for h in held.holdings
        if h.device.type == "cuda" and h.nbytes and not stays(held, h)
    ]
    owners = [h.tensors[0] for h in held.holdings if h.device.type == "cuda" and h.nbytes]
    owners = [t for t in owners if t.untyped_storage()._cdata not in held.addressed]
    del held
    both = {"model": model, "views": views}
    before = contents(both)
    qmove.park(both)
    assert not any(view.is_cuda for view in really(views))
    qmove.restore(both)
    assert contents(both) == before
    for view, owner in zip(views, owners, strict=True):
        assert view.untyped_storage()._cdata == owner.untyped_storage()._cdata
        changed = int(view[0]) ^ 255
        view[0] = changed
        raw = torch.empty(0, dtype=torch.uint8, device="cuda")
        assert int(raw.set_(owner.untyped_storage(), 0, (1,), (1,))) == changed


def really(tensors: list[torch.Tensor]) -> list[Any]:
    """What tensors are, not what they answer while they are parked."""

    @dataclass
    class Place:
        is_cuda: bool

    with torch._C.DisableTorchFunctionSubclass():
        return [Place(tensor.is_cuda) for tensor in tensors]


def outputs(case: Case) -> None:
    """After a round trip, and one to another device and back, it computes the same."""
    model = case.built()
    expected = case.kind.outputs(model)
    qmove.park(model)
    qmove.restore(model)
    assert torch.equal(case.kind.outputs(model), expected)


def wakes(case: Case) -> None:
    """A parked one wakes when it is used, computes the same, and carries no trace of it."""
    model = case.built()
    expected, before, allocated = (
        case.kind.outputs(model),
        traces_of(case, model),
        case.gpu.allocated(),
    )
    content = steady(case, model)
    qmove.park(model)
    assert torch.equal(case.kind.outputs(model), expected)
    assert not qmove.is_parked(model)
    assert case.gpu.allocated() == allocated
    assert traces_of(case, model) == before
    assert steady(case, model) == content


def streams(case: Case) -> None:
    """It is used while it arrives, and is whole afterwards."""
    model = case.built()
    expected = None if case.kind.kernels else case.kind.outputs(model)
    before = steady(case, model)
    qmove.park(model)
    qmove.restore(model, stream=True)
    if expected is not None:
        assert torch.equal(case.kind.outputs(model), expected)
    streaming.wait_for()
    assert steady(case, model) == before


def rolls(case: Case) -> None:
    """It runs in less VRAM than it takes, and computes the same; a compiled one is refused."""
    model = case.built()
    expected, whole = case.kind.outputs(model), movable_bytes(model)
    before = steady(case, model)
    if not case.kind.rolls:
        with pytest.raises((CannotMove, NotEnoughMemory)), qmove.resident(model, at_most=whole - 1):
            pass
        assert steady(case, model) == before
        return
    with qmove.resident(model, at_most=whole - 1):
        assert torch.equal(case.kind.outputs(model), expected)
    qmove.restore(model)
    streaming.wait_for()
    assert steady(case, model) == before


def on_disk(case: Case) -> None:
    """It waits on the disk, and comes back the same."""
    qmove.configure(disk_folder=str(case.folder))
    model = case.built()
    expected = None if case.kind.kernels else case.kind.outputs(model)
    before, content = steady(case, model), case.gpu.allocated() - movable_bytes(model)
    qmove.park(model, to="disk")
    assert case.gpu.allocated() == content
    if expected is not None:
        assert torch.equal(case.kind.outputs(model), expected)
        assert not qmove.is_parked(model)
    qmove.restore(model)
    assert steady(case, model) == before


def moves_to_cpu(case: Case) -> None:
    """`move` to the CPU: it computes there, or is refused by name; back again it is the same."""
    model = case.built()
    expected = None if case.kind.kernels else case.kind.outputs(model)
    before = steady(case, model)
    if case.kind.cpu == "refused":
        with pytest.raises(CannotMove):
            qmove.move(model, "cpu")
        assert steady(case, model) == before
        return
    qmove.move(model, "cpu")
    assert case.gpu.allocated() == 0
    if case.kind.cpu != "bytes":
        on_cpu = case.kind.outputs(model, "cpu")
        if case.kind.cpu == "exact":
            assert torch.equal(on_cpu, expected)
        elif case.kind.cpu == "runs":
            assert on_cpu.shape == expected.shape and on_cpu.isfinite().all()
        else:
            torch.testing.assert_close(on_cpu, expected, rtol=0.05, atol=0.05)
    qmove.move(model, "cuda:0")
    # Not the attributes: in a forward on the CPU libraries keep things in other places.
    after = steady(case, model)
    assert {name: facts[1] for name, facts in after.items() if isinstance(facts[1], bytes)} == {
        name: facts[1] for name, facts in before.items() if isinstance(facts[1], bytes)
    }
    if expected is not None:
        assert torch.equal(case.kind.outputs(model), expected)


def casts(case: Case) -> None:
    """A cast of quantized weights is refused, parked or not; another one does what PyTorch does."""
    model = qmove.enable_to(case.built())
    if not case.kind.keeps_dtype:
        assert {p.dtype for p in model.to(torch.float64).parameters()} <= {torch.float64}
        return
    before = snapshot(model)
    for is_parked in (False, True):
        if is_parked:
            qmove.park(model)
        for cast in (
            lambda: model.to(torch.float32),
            model.half,
            lambda: model.to("cpu", torch.bfloat16),
        ):
            with pytest.raises(DtypeCastRefused):
                cast()
        assert qmove.is_parked(model) is is_parked
    qmove.restore(model)
    assert snapshot(model) == before


def materializes(case: Case) -> None:
    """What accelerate keeps of it in RAM, with meta tensors in the model, becomes real again."""
    import accelerate

    model = case.built()
    expected = None if case.kind.kernels else case.kind.outputs(model)
    if case.kind.cpu == "refused":
        pytest.skip("it cannot lie on the CPU, where accelerate would keep it")
    qmove.move(model, "cpu")
    before = contents(model)
    try:
        accelerate.cpu_offload(model, execution_device="cuda:0")
    except Exception as error:
        pytest.skip(f"accelerate cannot offload it: {type(error).__name__}: {first_line(error)}")
    meta = [id(item.tensor) for item in qmove.inventory(model).meta]
    if not meta:
        pytest.skip("accelerate finds no weight in it to offload")
    if not case.kind.materializes:
        with pytest.raises((MetaTensorsPresent, CannotMove)):
            qmove.materialize_meta_tensors(model)
        assert [id(item.tensor) for item in qmove.inventory(model).meta] == meta
        return
    with qmove.materialized(model):  # and the same dispatch after it
        qmove.move(model, "cuda:0")
        if expected is not None:
            assert torch.equal(case.kind.outputs(model), expected)
    assert [id(item.tensor) for item in qmove.inventory(model).meta] == meta
    qmove.materialize_meta_tensors(model)
    assert not qmove.inventory(model).meta
    assert not Counter(before.values()) - Counter(contents(model).values())  # caches may be new
    qmove.move(model, "cuda:0")
    if expected is not None:
        assert torch.equal(case.kind.outputs(model), expected)


class LowRank(nn.Module):
    """An adapter: what the layer gives, and a product of two small matrices beside it."""

    def __init__(self, layer: nn.Module, inside: int, outside: int, dtype: torch.dtype) -> None:
        super().__init__()
        seed = torch.Generator().manual_seed(3)
        down = torch.randn(inside, 4, generator=seed).to("cuda", dtype)
        up = torch.randn(4, outside, generator=seed).to("cuda", dtype)
        self.layer = layer
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.down @ self.up


def put_adapter_on(model: Any, kind: Kind) -> None:
    if kind.is_whole:
        pytest.skip("the whole model is its library's: there is no layer of ours to put it on")
    model.base = LowRank(model.base, kind.inside, kind.outside, kind.dtype)


def adapted(case: Case) -> None:
    """With an adapter around it, it leaves and wakes, and the adapter with it."""
    model = case.built()
    put_adapter_on(model, case.kind)
    expected = None if case.kind.kernels else case.kind.outputs(model)
    before, leaves = steady(case, model), movable_bytes(model)
    allocated = case.gpu.allocated()
    qmove.park(model)
    assert case.gpu.allocated() == allocated - leaves
    if expected is not None:
        assert torch.equal(case.kind.outputs(model), expected)
    qmove.restore(model)
    assert steady(case, model) == before


def added_while_parked(case: Case) -> None:
    """An adapter that is put on while it is parked counts when it wakes, and leaves with it."""
    model, twin = case.built(), case.built()
    put_adapter_on(twin, case.kind)
    expected = None if case.kind.kernels else case.kind.outputs(twin)
    del twin
    empty = case.gpu.allocated() - movable_bytes(model)
    qmove.park(model)
    put_adapter_on(model, case.kind)
    if expected is not None:
        assert torch.equal(case.kind.outputs(model), expected)
    qmove.restore(model)
    qmove.park(model)
    assert case.gpu.allocated() == empty


def copied_while_parked(case: Case) -> None:
    """A deep copy of a parked one computes what it does, and its state dict has the same bytes."""
    model = case.built()
    expected = None if case.kind.kernels else case.kind.outputs(model)
    try:
        resident = copy.deepcopy(model)
    except Exception as error:
        pytest.skip(f"it cannot be deep-copied at home either: {type(error).__name__}")
    if expected is not None and not torch.equal(case.kind.outputs(resident), expected):
        pytest.skip("its deep copy computes something else at home too")
    del resident
    qmove.park(model)
    copied = copy.deepcopy(model)
    assert qmove.is_parked(model)
    del model
    if expected is not None:
        assert torch.equal(case.kind.outputs(copied.cuda()), expected)


@contextmanager
def failing(what: str, nth: int) -> Iterator[Any]:
    with simcuda.fail(what, nth=nth, times=1000) as fault:
        yield fault


def faults(case: Case) -> None:
    """A copy or an allocation that fails, at the first, a middle and the last one, on both ways:
    the model stays where it was."""
    model = case.built()
    home, allocated = snapshot(model), case.gpu.allocated()
    held = qmove.inventory(model)
    leaving = [h for h in held.holdings if h.device.type == "cuda" and h.nbytes]
    number = len([h for h in leaving if not stays(held, h)])
    del held, leaving
    for nth in sorted({1, (number + 1) // 2, number}):
        with pytest.raises(Exception), failing("copy", nth) as fault:  # noqa: B017
            qmove.park(model)
        assert fault.fired, nth
        assert snapshot(model) == home
        assert case.gpu.allocated() == allocated
        assert not qmove.is_parked(model)
    qmove.park(model)
    away, empty = snapshot(model), case.gpu.allocated()
    for what in ("copy", "alloc"):
        with pytest.raises(Exception), failing(what, 2) as fault:  # noqa: B017
            qmove.restore(model)
        assert fault.fired, what
        assert snapshot(model) == away
        assert case.gpu.allocated() == empty
        assert qmove.is_parked(model)
    qmove.restore(model)
    assert snapshot(model) == home


CHECKS: dict[str, Callable[[Case], None]] = {
    "parked": parked,
    "restored": restored,
    "attributes": attributes,
    "aliases": aliases,
    "outputs": outputs,
    "wakes": wakes,
    "streams": streams,
    "rolls": rolls,
    "on disk": on_disk,
    "move to the CPU": moves_to_cpu,
    "casts": casts,
    "materialized": materializes,
    "adapter": adapted,
    "added while parked": added_while_parked,
    "copied while parked": copied_while_parked,
    "faults": faults,
}


def each_copy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a fault meets the middle of a model, as it does in a big one."""
    monkeypatch.setattr(copies, "SMALL", 0)

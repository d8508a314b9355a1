"""Streaming restore: the model is home at once, each part of it waits only for its own bytes, and nobody is ever too early."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core import devices
from qmove_core.digests import digest
from qmove_core.memory import arena
from qmove_core.model import kinds
from qmove_core.parking import layer_order, pending_tensors, sleeping, streaming
from qmove_core.transfer import copies
from tests.builders.device import GPU
from tests.builders.models import (
    layers,
    llama_inputs,
    quanto_layers,
    snapshot,
    tiny_diffusion,
    tiny_llama,
    tiny_stable_diffusion,
)
from tests.builders.models import torchao_layers as torchao
from tests.guarantees.test_exact import BUILDERS
from tests.guarantees.test_quiet import traces

pytestmark = pytest.mark.simulated


@pytest.fixture
def singly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each storage is a copy of its own, as in a big model."""
    monkeypatch.setattr(copies, "SMALL", 0)


@pytest.fixture(autouse=True)
def tried_out(gpu: GPU) -> None:
    """Digests are tried out once for each device, which waits."""
    assert digest.available(gpu.device)


def inputs(width: int = 64) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * width, device="cuda").reshape(2, width)


def copies_queued() -> int:
    """Jobs that the stream of what comes in has still to run."""
    return simcuda.queued(devices.own_stream(torch.device("cuda", 0), "in"))


def is_arriving() -> bool:
    return bool(streaming._under_way)


def stream_in(model: object) -> qmove.Restored:
    """Begins a streaming restore of a parked model."""
    restored = qmove.restore(model, stream=True)
    assert is_arriving() and copies_queued() > 0, "it waited"
    return restored


@contextmanager
def copies_in() -> Iterator[list[int]]:
    """Notes the bytes of each copy that comes in, in order."""
    seen: list[int] = []

    def note(notice: simcuda.CopyNotice) -> None:
        if notice.direction == "h2d":
            seen.append(notice.nbytes)

    with simcuda.on_copy(note):
        yield seen


def bytes_of(model: object) -> dict[str, Any]:
    return {name: content[1] for name, content in snapshot(model).items()}


# As fast as the slower of link and computing ----------------------------------------------------------------------------


class Timed(nn.Module):
    """A layer of 20 MiB that computes for a given time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.ones(20 << 20, dtype=torch.uint8, device="cuda"), requires_grad=False
        )
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        simcuda.clock.compute(self.seconds)
        return x + self.weight[-1]


@pytest.mark.parametrize(
    ("link", "ratio", "keep_mirrors", "reached"),
    [
        ("pcie4", 0.25, True, 1.1),
        ("pcie4", 1.0, True, 1.1),
        ("pcie5", 1.0, False, 1.1),
        ("pcie5", 1.0, True, 1.2),  # queuing the digest of a layer takes 66 us, copying it 380
        ("pcie5", 4.0, True, 1.1),
    ],
)
def test_restore_and_first_forward_take_hardly_longer_than_the_slower_of_copying_and_computing(
    gpu: GPU, link: str, ratio: float, keep_mirrors: bool, reached: float
) -> None:
    qmove.configure(keep_mirrors=keep_mirrors)
    simcuda.link.use(link)
    try:
        rate = simcuda.link.current().h2d_pinned
        model = nn.Sequential(*[Timed(ratio * (20 << 20) / rate) for _ in range(16)])
        qmove.park(model)
        copying, computing = 16 * (20 << 20) / rate, 16 * model[0].seconds
        x = torch.zeros(1, device="cuda")
        simcuda.clock.reset()

        qmove.restore(model, stream=True)
        result = model(x)
        torch.cuda.synchronize()

        assert max(copying, computing) <= simcuda.clock.now() <= reached * max(copying, computing)
        assert result.item() == 16
    finally:
        simcuda.link.use("pcie4")


def test_computing_starts_when_the_first_layer_has_arrived(gpu: GPU) -> None:
    model = nn.Sequential(*[Timed(0.0) for _ in range(8)])
    parked = qmove.park(model)
    x = torch.zeros(1, device="cuda")
    simcuda.clock.reset()
    qmove.restore(model, stream=True)
    model[0](x)
    assert simcuda.clock.now() < 1.3 / 8 * parked.nbytes / simcuda.link.current().h2d_pinned


# Each module waits for its own --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize("keep_mirrors", [False, True])
def test_a_layer_waits_for_its_own_bytes_and_no_others(gpu: GPU, keep_mirrors: bool) -> None:
    qmove.configure(keep_mirrors=keep_mirrors)
    model = layers(4)
    x = inputs()
    expected = [layer(x) for layer in model]
    qmove.park(model)
    stream_in(model)
    left = copies_queued()
    for index, layer in enumerate(model):
        assert type(layer.weight) is not nn.Parameter
        assert torch.equal(layer(x), expected[index])
        assert type(layer.weight) is type(layer.bias) is nn.Parameter
        assert copies_queued() < left
        left = copies_queued()
        assert is_arriving() == (index < 3)
    assert left == 0


@pytest.mark.usefixtures("singly")
def test_a_tensor_that_is_used_by_itself_waits_for_its_own_bytes_and_no_others(gpu: GPU) -> None:
    model = layers(4)
    expected = model[1].weight.sum()
    qmove.park(model)
    stream_in(model)
    assert torch.equal(model[1].weight.sum(), expected)
    assert type(model[1].weight) is nn.Parameter
    assert type(model[3].weight) is not nn.Parameter
    assert is_arriving() and copies_queued() > 0


def test_shape_dtype_and_device_are_known_without_waiting(gpu: GPU) -> None:
    model = layers(2)
    qmove.park(model)
    stream_in(model)
    left = copies_queued()
    weight = model[1].weight
    assert (weight.shape, weight.dtype, weight.device, weight.requires_grad) == (
        (64, 64),
        torch.float32,
        gpu.device,
        False,
    )
    assert (weight.numel(), weight.stride(), weight.is_contiguous(), len(weight)) == (
        4096,
        (64, 1),
        True,
        64,
    )
    assert (
        weight.is_cuda
        and weight.is_floating_point()
        and weight.element_size() == 4
        and weight.nbytes == 16384
    )
    assert isinstance(weight, nn.Parameter) and isinstance(weight, torch.Tensor)
    assert [name for name, _ in model.named_parameters()] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
    assert qmove.inventory(model).by_device == {"cuda:0": 2 * (16384 + 256)}
    assert copies_queued() == left


class OutOfOrder(nn.Module):
    """Uses its blocks backwards, and before them what was registered after them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Linear(64, 64 + index, bias=False, device="cuda") for index in range(4)
        )
        self.head = nn.Linear(64, 8, bias=False, device="cuda")
        self.rotary = nn.Linear(64, 4, bias=False, device="cuda")
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, with_rotary: bool = False) -> torch.Tensor:
        total = self.rotary(x).sum() if with_rotary else torch.zeros((), device="cuda")
        for block in reversed(self.blocks):
            total = total + block(x).sum()
        return total + self.head(x).sum()


@pytest.mark.usefixtures("singly")
def test_layers_arrive_in_the_order_in_which_they_were_last_used(gpu: GPU) -> None:
    model, x = OutOfOrder(), inputs()
    expected = model(x)
    *blocks, head, rotary = [weight.nbytes for weight in model.parameters()]
    orders = []
    for _ in range(2):
        qmove.park(model)
        with copies_in() as order:
            stream_in(model)
        orders.append(order)
        assert torch.equal(model(x), expected)
        streaming.settle()
    assert orders == [[*blocks, head, rotary], [*blocks[::-1], head, rotary]]
    qmove.park(model)
    with copies_in() as order:
        qmove.restore(model)
    assert order == orders[1], "a restore that waits brings them in the same order"


@pytest.mark.usefixtures("singly")
def test_what_is_needed_first_and_came_last_comes_first_the_next_time(gpu: GPU) -> None:
    """As the table of a rotary embedding does, which a transformer registers after its layers."""
    model, x = OutOfOrder(), inputs()
    expected = model(x, True)
    qmove.park(model)
    stream_in(model)
    assert torch.equal(model(x, True), expected)
    qmove.park(model)
    with copies_in() as order:
        stream_in(model)
    assert order[0] == model.rotary.weight.nbytes
    assert torch.equal(model(x, True), expected)


def test_a_unit_is_a_layer_with_all_below_it_or_a_module_outside_of_all_layers(gpu: GPU) -> None:
    model = nn.Module()
    model.norm = nn.LayerNorm(8)
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
    model.table = nn.Parameter(torch.ones(8))
    model.blocks[1][0].bias = model.blocks[0][0].bias
    found = layer_order.units_of(qmove.inventory(model))
    assert {unit.name: sorted(holding.name for holding in unit.holdings) for unit in found} == {
        "": ["table"],
        "norm": ["norm.bias", "norm.weight"],
        "blocks.0": ["blocks.0.0.bias", "blocks.0.0.weight"],
        "blocks.1": ["blocks.0.0.bias", "blocks.1.0.weight"],
    }
    (second,) = [unit for unit in found if unit.name == "blocks.1"]
    assert second.modules == list(model.blocks[1].modules())


# Waking streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_generate_wakes_a_llama_that_computes_while_the_rest_arrives(
    gpu: GPU, precision: str, tmp_path: Any
) -> None:
    model = tiny_llama(precision, tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(llama_inputs(), **options)
    seen: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(is_arriving()))
    before, contents = traces(model), bytes_of(model)
    for _ in range(2):
        seen.clear()
        qmove.park(model)
        assert torch.equal(model.generate(llama_inputs(), **options), expected)
        assert seen == [True, False, False, False]
        assert not is_arriving()
        assert traces(model) == before
        assert bytes_of(model) == contents


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize(
    "build", [tiny_diffusion, tiny_stable_diffusion], ids=lambda build: build.__name__
)
def test_a_pipeline_wakes_and_computes_while_the_rest_arrives(
    gpu: GPU, build: Callable[[], Any]
) -> None:
    pipe = build()
    prompt = {"prompt": "a cat"} if build is tiny_stable_diffusion else {}

    def image() -> Any:
        seed = torch.Generator(pipe._execution_device).manual_seed(0)
        return pipe(**prompt, generator=seed, num_inference_steps=2, output_type="np").images

    expected = image()
    seen: list[bool] = []
    first = pipe.text_encoder if prompt else pipe.unet.conv_in
    first.register_forward_hook(lambda *_: seen.append(is_arriving()))
    before = traces(pipe.unet)
    for _ in range(2):
        qmove.park(pipe)
        seen.clear()
        assert (image() == expected).all()
        assert seen[0]
        streaming.settle()
        assert traces(pipe.unet) == before
        assert not qmove.is_parked(pipe)


# Nobody is too early ----------------------------------------------------------------------------------------------------


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def raw_bytes(model: nn.Module) -> bytes:
    """What somebody's own kernel finds behind `data_ptr()`; the simulated device's memory lies on the host."""
    import ctypes

    return ctypes.string_at(model[3].weight.data_ptr(), model[3].weight.nbytes)


USES: dict[str, Callable[[Any], Any]] = {
    "matmul": lambda model: inputs() @ model[3].weight.T,
    "keyword": lambda model: F.linear(inputs(), weight=model[3].weight, bias=model[3].bias),
    "in a list": lambda model: torch.cat([model[2].weight, model[3].weight]),
    "in a dict": lambda model: torch.func.functional_call(
        nn.Linear(64, 64), {"weight": model[3].weight, "bias": model[3].bias}, inputs()
    ),
    "foreach": lambda model: torch._foreach_mul(list(model.parameters()), 2.0)[6],
    "index": lambda model: model[3].weight[3, 5],
    "rows": lambda model: next(iter(model[3].weight)),
    "item": lambda model: model[3].bias[0].item(),
    "tolist": lambda model: model[3].bias.tolist(),
    "repr": lambda model: repr(model[3].bias),
    "data": lambda model: model[3].weight.data + 0,
    "detach": lambda model: model[3].weight.detach().clone(),
    "to the host": lambda model: model[3].weight.cpu(),
    "in place": lambda model: model[3].weight.mul_(2).clone(),
    "in place through data": lambda model: (model[3].weight.data.mul_(2), model[3].weight.clone())[
        1
    ],
    "comparison": lambda model: model[3].weight > 0,
    "data_ptr": raw_bytes,
    "storage": lambda model: bytes(model[3].weight.untyped_storage().cpu().tolist()[:64]),
    "dlpack": lambda model: torch.from_dlpack(model[3].weight).clone(),
    "state_dict": lambda model: model.state_dict()["3.weight"].clone(),
    "saved": lambda model: saved(model.state_dict())["3.weight"],
    "saved module": lambda model: saved(model)[3].weight,
    "pickled tensor": lambda model: pickled(model[3].weight),
    "pickled module": lambda model: pickled(model)[3].weight,
    "copied tensor": lambda model: copy.copy(model[3].weight),
    "deep copied tensor": lambda model: copy.deepcopy(model[3].weight),
    "deep copied module": lambda model: copy.deepcopy(model)[3].weight,
    "half": lambda model: model.half()[3].weight,
    "vector": lambda model: nn.utils.parameters_to_vector(model.parameters()),
    "vmap": lambda model: torch.vmap(lambda row: row * 2)(model[3].weight),
    "gradient": lambda model: torch.autograd.functional.vjp(
        lambda x: x @ model[3].weight, inputs(), inputs()
    )[1],
}


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_whoever_uses_a_weight_outside_its_module_waits_for_it(
    gpu: GPU, use: Callable[[Any], Any]
) -> None:
    expected = use(layers(4))
    model = layers(4)
    qmove.park(model)
    stream_in(model)

    result = use(model)

    if isinstance(expected, torch.Tensor):
        assert type(result) is type(expected)
        assert torch.equal(result, expected)
    else:
        assert result == expected
    assert type(model[3].weight) is nn.Parameter


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "save"]
)
def test_a_copy_of_a_model_that_arrives_is_an_ordinary_one(
    gpu: GPU, make_copy: Callable[[Any], Any]
) -> None:
    model = layers(3)
    model[1].weight.note = "a Parameter's deepcopy drops it, its pickle does not"
    expected, ordinary = model(inputs()), traces(make_copy(model))
    qmove.park(model)
    stream_in(model)
    made = make_copy(model)
    assert traces(made) == ordinary
    assert torch.equal(made(inputs()), expected)
    assert torch.equal(model(inputs()), expected)


class Scaled(nn.Parameter):
    """A Parameter subclass with its own idea of operators."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.Tensor.sum else result


class Final(nn.Parameter):
    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


class Slotted(torch.Tensor):
    __slots__ = ("note",)


@pytest.mark.parametrize(
    "kind", [Scaled, Final, Slotted, nn.Buffer], ids=lambda kind: kind.__name__
)
def test_tensor_subclasses_keep_their_class_and_their_ways(gpu: GPU, kind: Any) -> None:
    model = layers(2)
    content = model[1].weight.data.clone()
    weight = content.as_subclass(Slotted) if kind is Slotted else kind(content)
    del model[1].weight
    model[1].weight = weight.requires_grad_(False)
    expected, result = model[1].weight.sum().clone(), model(inputs())
    qmove.park(model)
    stream_in(model)
    assert isinstance(model[1].weight, kind)
    assert torch.equal(model[1].weight.sum(), expected)
    assert type(model[1].weight) is (torch.Tensor if kind is nn.Buffer else kind)
    assert torch.equal(model(inputs()), result)


@pytest.mark.usefixtures("singly")
def test_tied_weights_and_views_wait_for_the_bytes_that_they_share(gpu: GPU) -> None:
    model = layers(3)
    model[2].weight = model[0].weight
    model.register_buffer("row", model[1].weight[3])
    outside = model[1].weight[4]
    uses = [lambda: model(inputs()), lambda: model.row.clone(), lambda: outside.clone()]
    expected = [use() for use in uses]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        qmove.park(model)
        stream_in(model)
        for index in order:
            assert torch.equal(uses[index](), expected[index])
        assert model[2].weight is model[0].weight
        assert model.row.untyped_storage()._cdata == model[1].weight.untyped_storage()._cdata


def test_hooks_see_weights_that_are_there(gpu: GPU) -> None:
    model = layers(3)
    seen: list[float] = []
    model[2].register_forward_pre_hook(
        lambda module, _inputs: seen.append(module.weight.sum().item())
    )
    model.register_forward_pre_hook(
        lambda module, _inputs: seen.append(module[1].weight.sum().item())
    )
    model(inputs())
    expected = seen[:]
    seen.clear()
    qmove.park(model)
    stream_in(model)
    model(inputs())
    assert seen == expected


@pytest.mark.usefixtures("singly")
def test_two_threads_use_a_model_that_arrives(gpu: GPU) -> None:
    model = layers(8)
    expected = [layer(inputs()) for layer in model]
    together = threading.Barrier(2)

    def call(order: Any, results: dict[int, Any]) -> None:
        together.wait()
        for index in order:
            results[index] = model[index](inputs())

    for _ in range(5):
        qmove.park(model)
        stream_in(model)
        found: list[dict[int, Any]] = [{}, {}]
        threads = [
            threading.Thread(target=call, args=(range(8), found[0])),
            threading.Thread(target=call, args=(range(7, -1, -1), found[1])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for results in found:
            assert [torch.equal(results[index], expected[index]) for index in range(8)] == [
                True
            ] * 8
        assert not is_arriving()


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("inside_inference_mode", [False, True])
def test_everything_is_as_it_was(
    gpu: GPU, build: Callable[[], nn.Module], inside_inference_mode: bool
) -> None:
    model = build()
    before, quiet = snapshot(model), traces(model)
    for _ in range(2):
        with torch.inference_mode(inside_inference_mode):
            qmove.park(model)
            qmove.restore(model, stream=True)
        streaming.settle()
        assert snapshot(model) == before
        assert traces(model) == quiet


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_of_inference_tensors_streams(gpu: GPU, mode: Any) -> None:
    with torch.inference_mode():
        model = layers(3)
    with mode():
        expected = model(inputs())
        qmove.park(model)
        stream_in(model)
        assert torch.equal(model(inputs()), expected)
    assert model[0].weight.is_inference()
    assert qmove.park(model).copied_bytes == 0


@pytest.mark.parametrize("order", ["registered", "backwards"])
def test_after_the_last_byte_nothing_is_left_on_the_model(gpu: GPU, order: str) -> None:
    model = layers(4)
    before = traces(model)
    qmove.park(model)
    stream_in(model)
    assert traces(model) != before
    for layer in model if order == "registered" else reversed(model):
        layer(inputs())
    streaming.settle()
    assert traces(model) == before
    assert not is_arriving()
    assert not sleeping._wakers
    assert not pending_tensors._waits
    gc.collect()
    assert not any(type(thing).__name__ in ("Arrival", "_Part") for thing in gc.get_objects())


# Where it cannot stream it waits ----------------------------------------------------------------------------------------


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """conftest.py switches TorchDynamo off."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)


WAITING: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: torch.compile(layers(2), backend="eager"),
    "compiled in place": lambda: (model := layers(2), model.compile(backend="eager"))[0],
    "a compiled part": lambda: nn.Sequential(layers(1), torch.compile(layers(1), backend="eager")),
    "ScriptModule": lambda: torch.jit.script(layers(2)),
    "traced": lambda: torch.jit.trace(layers(2), inputs()),
}


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("build", WAITING.values(), ids=WAITING.keys())
def test_models_that_python_does_not_see_run_wait_for_all(
    gpu: GPU, build: Callable[[], nn.Module]
) -> None:
    model = build()
    expected = model(inputs())
    qmove.park(model)
    qmove.restore(model, stream=True)
    assert not is_arriving() and copies_queued() == 0
    assert torch.equal(model(inputs()), expected)
    qmove.park(model)
    assert torch.equal(model(inputs()), expected), "it wakes so, too"


@pytest.mark.parametrize(
    "build", [lambda: torchao("int8"), lambda: quanto_layers("qint8")], ids=["torchao", "quanto"]
)
def test_wrapper_subclasses_wait_for_all(gpu: GPU, build: Callable[[], nn.Module]) -> None:
    model = build()
    before = snapshot(model)
    qmove.park(model)
    qmove.restore(model, stream=True)
    assert not is_arriving() and copies_queued() == 0
    assert snapshot(model) == before


def test_a_restore_that_reports_progress_waits_for_all(gpu: GPU) -> None:
    model = layers(2)
    done: list[int] = []
    parked = qmove.park(model)
    qmove.restore(model, stream=True, progress=lambda so_far, _total: done.append(so_far))
    assert done[-1] == parked.nbytes
    assert not is_arriving() and copies_queued() == 0


@pytest.mark.usefixtures("compiling", "singly")
def test_a_compiled_function_around_a_model_that_arrives_is_not_too_early(gpu: GPU) -> None:
    model = layers(3)
    expected = model(inputs())
    compiled = torch.compile(lambda x: model(x), backend="eager")
    for begin in (lambda: None, lambda: stream_in(model), lambda: None):
        assert torch.equal(compiled(inputs()), expected)
        qmove.park(model)
        begin()
        assert torch.equal(compiled(inputs()), expected)


# Failures ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize("keep_mirrors", [False, True])
@pytest.mark.parametrize("nth", [1, 3, 8])
def test_a_copy_that_fails_on_its_way_leaves_the_model_parked_with_its_bytes(
    gpu: GPU, nth: int, keep_mirrors: bool
) -> None:
    qmove.configure(keep_mirrors=keep_mirrors)
    model, x = layers(4), inputs()
    before, expected = snapshot(model), model(x)
    qmove.park(model)
    parked, around = snapshot(model), gpu.allocated()

    with (
        simcuda.fail("copy", nth=nth, late=True) as fault,
        pytest.raises(RuntimeError, match="injected"),
    ):
        qmove.restore(model, stream=True)
        model(x)

    assert fault.fired == 1
    assert qmove.is_parked(model)
    assert qmove.parked_models() == [model]
    assert snapshot(model) == parked
    assert gpu.allocated() == around
    torch.cuda.synchronize()  # no copy was left behind that writes to what was freed
    assert torch.equal(model(x), expected), "it sleeps again, and wakes"
    streaming.settle()
    assert snapshot(model) == before


@pytest.mark.usefixtures("singly")
def test_a_failed_arrival_does_not_undo_what_the_host_changed(gpu: GPU) -> None:
    model = layers(3)
    qmove.park(model)
    model[1].weight.data.add_(1)
    wanted = bytes_of(model)
    with simcuda.fail("copy", nth=4, late=True), pytest.raises(RuntimeError, match="injected"):
        qmove.restore(model, stream=True)
        streaming.settle()
    assert bytes_of(model) == wanted
    qmove.restore(model)
    assert bytes_of(model) == wanted


@pytest.mark.parametrize("at", ["refresh", "put_to_sleep", "await_bytes"])
def test_a_start_that_fails_leaves_the_model_parked_and_the_device_empty(
    gpu: GPU, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layers(4)
    before, empty = snapshot(model), torch.cuda.memory_allocated() - gpu.allocated()
    qmove.park(model)
    parked = snapshot(model)
    place = {"refresh": kinds, "put_to_sleep": sleeping, "await_bytes": streaming}[at]
    real, calls = getattr(place, at), []

    def fails_at_the_second_call(*arguments: Any) -> None:
        calls.append(at)
        if len(calls) == (1 if at == "refresh" else 2):
            raise RuntimeError("planted")
        real(*arguments)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted") as raised:
        patched.setattr(place, at, fails_at_the_second_call)
        qmove.restore(model, stream=True)

    assert not is_arriving()
    assert qmove.is_parked(model)
    assert snapshot(model) == parked
    assert torch.cuda.memory_allocated() == empty and raised.value is not None
    qmove.restore(model, stream=True)
    streaming.settle()
    assert snapshot(model) == before


def test_too_little_vram_leaves_the_model_parked(gpu: GPU) -> None:
    model = layers(4)
    expected, before = model(inputs()), snapshot(model)
    parked = qmove.park(model)
    bytes_parked = snapshot(model)
    simcuda.set_memory(torch.cuda.memory_allocated() + parked.nbytes - 1)
    for attempt in (lambda: qmove.restore(model, stream=True), lambda: model(inputs())):
        with pytest.raises(qmove.NotEnoughMemory):
            attempt()
        assert qmove.is_parked(model) and not is_arriving()
        assert snapshot(model) == bytes_parked
    simcuda.set_memory("4GiB")
    assert torch.equal(model(inputs()), expected)
    streaming.settle()
    assert snapshot(model) == before


# Whatever comes while it arrives ----------------------------------------------------------------------------------------


def test_a_park_waits_and_copies_nothing(gpu: GPU) -> None:
    model = layers(4)
    before = bytes_of(model)
    for _ in range(3):
        parked = qmove.park(model)
        assert bytes_of(model) == before
        stream_in(model)
    assert parked.copied_bytes == 0
    qmove.park(model)
    assert gpu.allocated() == 0


def test_a_change_while_it_arrives_is_kept(gpu: GPU) -> None:
    model = layers(4)
    qmove.park(model)
    stream_in(model)
    model[1].weight.data.add_(1)
    changed = model[1].weight.nbytes
    streaming.settle()
    wanted = bytes_of(model)
    assert qmove.park(model).copied_bytes == changed
    assert bytes_of(model) == wanted


def test_a_second_restore_an_inventory_and_the_books_see_a_model_that_is_home(gpu: GPU) -> None:
    model = layers(4)
    before = snapshot(model)
    qmove.park(model)
    stream_in(model)
    assert not qmove.is_parked(model)
    assert qmove.parked_models() == []
    assert (qmove.stats().parked_models, qmove.stats().parked_bytes) == (0, {})
    assert {holding.device for holding in qmove.inventory(model).holdings} == {gpu.device}
    assert is_arriving()
    assert qmove.restore(model).nbytes == 0
    assert snapshot(model) == before


@pytest.mark.parametrize("target", ["cpu", "cuda:1"])
def test_a_move_waits(gpu: GPU, second_gpu: GPU, target: str) -> None:
    model = layers(4)
    expected, before = model(inputs()).cpu(), bytes_of(model)
    qmove.park(model)
    stream_in(model)
    qmove.move(model, target)
    assert gpu.allocated() == 0
    assert bytes_of(model) == before
    torch.testing.assert_close(model(inputs().to(target)).cpu(), expected)


@pytest.mark.usefixtures("singly")
def test_a_model_that_is_deleted_while_it_arrives_takes_its_memory_along(gpu: GPU) -> None:
    model = layers(4)
    qmove.park(model)
    stream_in(model)
    model[0](inputs())
    del model
    gc.collect()
    torch.cuda.synchronize()  # no copy writes to what was freed
    other = layers(1)
    qmove.park(other)  # the next move lets go of what copies were still writing to
    gc.collect()
    assert not is_arriving()
    assert gpu.allocated() == 0
    assert arena.bytes_in_use() == arena.bytes_for([16384, 256])
    assert qmove.parked_models() == [other]


def test_a_layer_that_is_taken_out_while_it_arrives_works(gpu: GPU) -> None:
    model = layers(4)
    expected = model[3](inputs())
    qmove.park(model)
    stream_in(model)
    head = model[3]
    del model
    gc.collect()
    assert torch.equal(head(inputs()), expected)
    assert type(head) is nn.Linear


def test_two_models_arrive_at_once(gpu: GPU) -> None:
    first, second = layers(4), layers(3)
    expected, other = first(inputs()), second(inputs())
    qmove.park(first)
    qmove.park(second)
    stream_in(first)
    qmove.restore(second, stream=True)
    assert len(streaming._under_way) == 2
    assert torch.equal(second(inputs()), other)
    assert torch.equal(first(inputs()), expected)
    assert not is_arriving()


def test_a_model_on_two_devices_streams_to_both(gpu: GPU, second_gpu: GPU) -> None:
    model = nn.Sequential(layers(2, device="cuda:0"), layers(2, device="cuda:1"))
    before = snapshot(model)
    qmove.park(model)
    stream_in(model)
    model[0](inputs())
    model[1](inputs().to("cuda:1"))
    streaming.settle()
    assert snapshot(model) == before
    assert qmove.park(model).copied_bytes == 0


# Mirrors ----------------------------------------------------------------------------------------------------------------


def test_an_alias_that_was_written_to_while_the_model_arrived_makes_no_false_mirror(
    gpu: GPU,
) -> None:
    model = layers(12, width=1024)  # large enough that digests are taken on the device
    before = bytes_of(model)
    qmove.park(model)
    state = model.state_dict()
    stream_in(model)
    torch.cuda.synchronize()  # the bytes are on the device now
    state["1.weight"].add_(1)
    del state
    streaming.settle()
    assert bytes_of(model) == before
    qmove.park(model)
    assert bytes_of(model) == before


def test_what_came_home_streaming_has_mirrors(gpu: GPU) -> None:
    model = layers(8, width=512)
    before, parked = snapshot(model), qmove.park(model)
    for _ in range(2):
        stream_in(model)
        model(inputs(512))
        assert qmove.stats().mirror_bytes == parked.nbytes
        assert qmove.park(model).copied_bytes == 0
    qmove.restore(model)
    assert snapshot(model) == before


# Prefetch ---------------------------------------------------------------------------------------------------------------


def test_prefetch_begins_where_there_is_room(gpu: GPU) -> None:
    model = layers(4)
    expected, parked = model(inputs()), qmove.park(model)
    begun = qmove.prefetch(model)
    assert begun is not None and begun.nbytes == parked.nbytes
    assert is_arriving() and copies_queued() > 0
    assert torch.equal(model(inputs()), expected)


def test_prefetch_leaves_a_model_parked_that_does_not_fit(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = layers(4), layers(4)
    parked = qmove.park(model)
    before = snapshot(model)
    simcuda.set_memory(torch.cuda.memory_allocated() + parked.nbytes - 1)
    asked: list[int] = []
    monkeypatch.setattr(
        "qmove_core.hosting._ask_for_room", [lambda _device, nbytes: asked.append(nbytes)]
    )
    assert qmove.prefetch(model) is None
    assert not asked, "nobody is to make room for it"
    assert qmove.is_parked(model) and not is_arriving()
    assert snapshot(model) == before
    assert not qmove.is_parked(other)


def test_prefetch_of_a_resident_model_does_nothing(gpu: GPU) -> None:
    model = layers(4)
    begun = qmove.prefetch(model)
    assert begun is not None and begun.nbytes == 0
    assert not is_arriving()


def test_prefetch_overlaps_with_what_another_model_computes(gpu: GPU) -> None:
    coming = nn.Sequential(*[Timed(0.0) for _ in range(4)])
    parked = qmove.park(coming)
    copying = parked.nbytes / simcuda.link.current().h2d_pinned
    simcuda.clock.reset()
    qmove.prefetch(coming)
    assert simcuda.clock.now() < copying / 4, "it returned at once"
    simcuda.clock.compute(2 * copying)  # the other model
    torch.cuda.synchronize()
    assert simcuda.clock.now() < 1.25 * 2 * copying

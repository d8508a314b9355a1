"""A parked model wakes when it is used, gives the very results of a resident one, and then carries no trace of its sleep."""

from __future__ import annotations

import abc
import copy
import gc
import io
import logging
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena
from tests.builders.device import GPU
from tests.builders.models import (
    layers,
    llama_inputs,
    snapshot,
    tiny_diffusion,
    tiny_llama,
    tiny_stable_diffusion,
)


def inputs(width: int = 64) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * width, device="cuda").reshape(2, width)


def traces(model: nn.Module) -> list[tuple[Any, ...]]:
    """Class, attributes and hooks of every module."""
    return [
        (
            type(module),
            {name: id(value) for name, value in vars(module).items()},
            dict(module._forward_hooks),
        )
        for module in model.modules()
    ]


def contents(model: nn.Module) -> dict[str, tuple[str, bytes]]:
    """Device and bytes of every storage; bitsandbytes replaces empty tensors in each forward, so objects are not compared."""
    return {name: content[:2] for name, content in snapshot(model).items()}


# With the libraries people use -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_generate_on_a_parked_llama(gpu: GPU, precision: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny_llama(precision, tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(llama_inputs(model.device), **options)
    before, bytes_before = traces(model), contents(model)

    parked = qmove.park(model)
    assert parked.nbytes > 0
    assert model.device == gpu.device
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    result = model.generate(llama_inputs(model.device), **options)

    assert torch.equal(result, expected)
    assert not qmove.is_parked(model)
    assert traces(model) == before
    assert contents(model) == bytes_before


@pytest.mark.parametrize(
    "build", [tiny_diffusion, tiny_stable_diffusion], ids=lambda build: build.__name__
)
def test_a_parked_pipeline_gives_the_very_image_of_a_resident_one(
    gpu: GPU, build: Callable[[], Any]
) -> None:
    pipe = build()
    prompt = {"prompt": "a cat"} if build is tiny_stable_diffusion else {}

    def image() -> Any:
        seed = torch.Generator(pipe._execution_device).manual_seed(0)
        return pipe(**prompt, generator=seed, num_inference_steps=2, output_type="np").images

    expected = image()
    modules = [
        component for component in pipe.components.values() if isinstance(component, nn.Module)
    ]
    before, resident = [traces(module) for module in modules], gpu.allocated()

    parked = qmove.park(pipe)
    assert gpu.allocated() == resident - parked.nbytes
    assert parked.nbytes >= sum(
        tensor.nbytes for module in modules for tensor in module.state_dict().values()
    )
    assert pipe.device == pipe._execution_device == gpu.device
    assert {module.device for module in modules} == {gpu.device}

    assert (image() == expected).all()
    assert not qmove.is_parked(pipe)
    assert gpu.allocated() == resident
    assert [traces(module) for module in modules] == before


def test_a_part_of_a_pipeline_that_is_used_wakes_the_whole_pipeline(gpu: GPU) -> None:
    pipe = tiny_stable_diffusion()
    latents = torch.ones(1, 4, 8, 8, device="cuda")
    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample
        qmove.park(pipe)
        assert torch.equal(pipe.vae.decode(latents).sample, expected)
    assert not qmove.is_parked(pipe.unet)
    assert {parameter.device for parameter in pipe.text_encoder.parameters()} == {gpu.device}


# What counts as use ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(inputs()),
        lambda model: model.forward(inputs()),
        lambda model: model[3](model[2](model[1](model[0](inputs())))),
        lambda model: model[3].forward(model[2](model[1](model[0].forward(inputs())))),
    ],
    ids=["call", "forward", "call of the submodules", "forward of a submodule"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_call_wakes_the_whole_model(
    gpu: GPU, use: Callable[[nn.Module], torch.Tensor], mode: Any
) -> None:
    model = layers(4)
    with mode():
        expected = use(model)
        before, traces_before = snapshot(model), traces(model)

        qmove.park(model)
        result = use(model)

    assert torch.equal(result, expected)
    assert not qmove.is_parked(model)
    assert snapshot(model) == before
    assert traces(model) == traces_before


def test_the_first_call_of_one_submodule_brings_all_of_them_home(gpu: GPU) -> None:
    model = layers(4)
    qmove.park(model)

    model[2](inputs())

    assert {parameter.device for parameter in model.parameters()} == {gpu.device}


def test_a_forward_that_somebody_put_on_the_module_itself_wakes_it_too(gpu: GPU) -> None:
    model = layers(1)
    forward = model[0].forward
    model[0].forward = lambda x: forward(x) + 1
    expected, before = model[0](inputs()), traces(model)

    for use in (lambda: model[0](inputs()), lambda: model[0].forward(inputs())):
        qmove.park(model)
        assert torch.equal(use(), expected)
        assert not qmove.is_parked(model)
        assert traces(model) == before


def test_a_forward_that_is_set_while_the_model_is_parked_stays(gpu: GPU) -> None:
    model = layers(1)
    qmove.park(model)

    model[0].forward = lambda x: x + 1

    assert torch.equal(model(inputs()), inputs() + 1)
    assert torch.equal(model[0].forward(inputs()), inputs() + 1)
    del model[0].forward
    assert "forward" not in vars(model[0])


def test_two_threads_call_a_parked_model_at_once(gpu: GPU) -> None:
    model = layers(8)
    expected = model(inputs())
    together = threading.Barrier(2)
    results: list[Any] = [None, None]

    def call(index: int) -> None:
        together.wait()
        try:
            results[index] = model(inputs())
        except Exception as error:
            results[index] = error

    for _ in range(10):
        qmove.park(model)
        threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(result, expected) for result in results), results
        assert not qmove.is_parked(model)


def test_a_module_that_was_taken_out_of_a_parked_model_wakes_by_itself(gpu: GPU) -> None:
    model = layers(2)
    expected = model[1](inputs())
    qmove.park(model)
    head, model[1] = model[1], nn.Identity()

    assert torch.equal(head(inputs()), expected)
    assert head.weight.device == model[0].weight.device == gpu.device


def test_a_module_outlives_the_pipeline_it_was_parked_with(gpu: GPU) -> None:
    pipe = tiny_diffusion()
    unet, sample = pipe.unet, torch.ones(1, 3, 8, 8, device="cuda")
    with torch.no_grad():
        expected = unet(sample, 1).sample
        qmove.park(pipe)
        del pipe
        gc.collect()
        assert torch.equal(unet(sample, 1).sample, expected)


def test_a_wake_that_finds_no_room_says_so_and_works_when_there_is(gpu: GPU) -> None:
    if not simcuda.is_active():
        pytest.skip("needs the simulated GPU's memory limit")
    model = layers(4)
    expected, before = model(inputs()), snapshot(model)
    x = inputs()
    qmove.park(model)
    parked = snapshot(model)
    simcuda.set_memory(gpu.allocated() + 1000)

    with pytest.raises(qmove.NotEnoughMemory, match="Restoring Sequential needs"):
        model(x)

    assert qmove.is_parked(model)
    assert snapshot(model) == parked
    simcuda.set_memory("4GiB")
    assert torch.equal(model(x), expected)
    assert snapshot(model) == before


# What a parked model looks like -----------------------------------------------------------------------------------------


class Placed(nn.Module):
    """Like a model of transformers or diffusers: names its device by its first parameter."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, device=first).requires_grad_(False)
        self.second = nn.Linear(8, 8, device=second).requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


@pytest.mark.parametrize(
    ("first", "second"), [("cuda:0", "cuda:0"), ("cuda:0", "cpu"), ("cpu", "cuda:0")]
)
def test_device_is_what_it_was_before_the_park(gpu: GPU, first: str, second: str) -> None:
    model = Placed(first, second)

    qmove.park(model)

    assert str(model.device) == first
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_device_that_a_model_knows_by_itself_is_left_alone(gpu: GPU) -> None:
    class Knowing(nn.Linear):
        @property
        def device(self) -> torch.device:
            return torch.device("meta")

    model = Knowing(8, 8, device="cuda")
    qmove.park(model)

    assert model.device == torch.device("meta")


def test_a_parked_model_looks_like_itself(gpu: GPU) -> None:
    model = layers(2)
    as_text, names = repr(model), dir(model)

    qmove.park(model)

    assert repr(model) == as_text
    assert dir(model) == names
    assert type(model).__name__ == "Sequential"
    assert type(model).__qualname__ == nn.Sequential.__qualname__
    assert type(model).__module__ == nn.Sequential.__module__
    assert model.__class__ is nn.Sequential
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[0], nn.Linear)
    assert model.training
    assert len(model) == 2


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle protocol 0": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_a_copy_of_a_parked_model_is_an_ordinary_model(
    gpu: GPU, make_copy: Callable[[Any], Any]
) -> None:
    model = layers(2)
    expected = model(inputs()).cpu()
    qmove.park(model)

    copied = make_copy(model)

    assert qmove.is_parked(model)
    assert not qmove.is_parked(copied)
    assert [type(module) for module in copied.modules()] == [nn.Sequential, nn.Linear, nn.Linear]
    assert torch.equal(copied.cuda()(inputs()).cpu(), expected)
    assert qmove.is_parked(model)
    assert torch.equal(model(inputs()).cpu(), expected)


@pytest.mark.parametrize("what", ["the model", "its state_dict"])
def test_a_parked_model_can_be_saved(gpu: GPU, what: str) -> None:
    model = layers(2)
    expected = model(inputs()).cpu()
    qmove.park(model)
    file = io.BytesIO()

    torch.save(model if what == "the model" else model.state_dict(), file)

    assert file.tell() < 2 * sum(
        parameter.nbytes for parameter in model.parameters()
    )  # not the arena with each tensor
    file.seek(0)
    loaded = torch.load(file, weights_only=what != "the model")
    if what != "the model":
        state, loaded = loaded, layers(2, device="cpu")
        loaded.load_state_dict(state)
    assert type(loaded) is nn.Sequential
    assert torch.equal(loaded.cuda()(inputs()).cpu(), expected)
    assert qmove.is_parked(model)


def test_a_deep_copy_of_a_parked_pipeline(gpu: GPU) -> None:
    pipe = tiny_diffusion()
    own = type(pipe.unet)
    qmove.park(pipe)

    copied = copy.deepcopy(pipe)

    assert type(copied.unet) is own
    assert not qmove.is_parked(copied)
    assert qmove.is_parked(pipe)


def test_an_instance_made_from_the_class_of_a_parked_model_is_usable(gpu: GPU) -> None:
    model = layers(1)
    qmove.park(model)

    for cls in (type(model[0]), model[0].__class__):
        other = cls(4, 4)
        assert other(torch.ones(1, 4)).shape == (1, 4)
        assert type(other) is nn.Linear
    assert qmove.is_parked(model)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """conftest.py switches TorchDynamo off; in some tests it is a part of the story."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)


# Modules of all kinds ---------------------------------------------------------------------------------------------------


class Registering(type):
    """A metaclass that keeps a list of its classes, as model registries do."""

    seen: list[str] = []  # noqa: RUF012

    def __init__(cls, name: str, bases: Any, namespace: Any) -> None:
        super().__init__(name, bases, namespace)
        Registering.seen.append(name)


class Registered(nn.Module, metaclass=Registering):
    subclasses: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Registered.subclasses.append(cls)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...


class Concrete(Abstract):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Further(Concrete):
    pass


class Slotted(nn.Module):
    __slots__ = ("table",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)
        self.table = torch.ones(8, device="cuda")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.table


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "registering metaclass": Registered,
    "abstract base": Concrete,
    "__slots__": Slotted,
    "parametrized": weight_normed,
    "GraphModule": lambda: torch.fx.symbolic_trace(layers(2)),
    "ScriptModule": lambda: torch.jit.script(layers(2)),
    "TracedModule": lambda: torch.jit.trace(layers(2), inputs()),
    "compiled": lambda: torch.compile(layers(2), backend="eager"),
    "compiled in place": lambda: (model := layers(2), model.compile(backend="eager"))[0],
}


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS.keys())
def test_modules_of_all_kinds_wake(gpu: GPU, build: Callable[[], nn.Module]) -> None:
    model = build().cuda()
    x = inputs()
    with torch.no_grad():
        expected, allocated = model(x), gpu.allocated()
    classes = [type(module) for module in model.modules()]

    for use in (lambda: model(x), lambda: model.forward(x)):
        parked = qmove.park(model)
        assert gpu.allocated() == allocated - parked.nbytes
        assert parked.nbytes >= sum(tensor.nbytes for tensor in model.state_dict().values()) > 0
        if build is Slotted:
            assert model.table.device.type == "cpu"

        with torch.no_grad():
            assert torch.equal(use(), expected)
        assert not qmove.is_parked(model)
        assert [type(module) for module in model.modules()] == classes


def test_no_library_hears_of_the_class_of_a_sleeping_module(gpu: GPU) -> None:
    model = Registered().cuda()
    qmove.park(model)

    assert Registering.seen == ["Registered"]
    assert Registered.subclasses == []


def test_isinstance_of_an_abstract_class_is_not_confused(gpu: GPU) -> None:
    model = Concrete().cuda()
    qmove.park(model)

    assert isinstance(model, Abstract)
    assert issubclass(type(model), Concrete)
    assert not issubclass(Further, type(model))
    assert issubclass(Further, Concrete)


class Final(type):
    """A metaclass that allows its classes no subclass."""

    def mro(cls) -> Any:
        if any(isinstance(base, Final) for base in cls.__bases__):
            raise TypeError(f"{cls.__bases__[-1].__name__} is final")
        return super().mro()


class Unique(nn.Module, metaclass=Final):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


def test_a_class_that_allows_no_subclass_is_named_in_the_log_and_can_be_restored(
    gpu: GPU, caplog
) -> None:  # type: ignore[no-untyped-def]
    empty = gpu.allocated()
    model = Unique().cuda()
    before = snapshot(model)

    with caplog.at_level(logging.WARNING, "qmove"):
        qmove.park(model)

    [warning] = caplog.records
    assert (
        "Unique will not wake by itself (Unique is final); call qmove.restore"
        in warning.getMessage()
    )
    assert gpu.allocated() == empty
    with pytest.raises(RuntimeError, match="cpu"):
        model(inputs())
    qmove.restore(model)
    assert snapshot(model) == before
    assert torch.equal(model(inputs()), inputs() + 1)


@pytest.mark.usefixtures("compiling")
def test_a_model_wakes_through_what_torch_compile_returned_and_is_not_compiled_again_and_again(
    gpu: GPU,
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = layers(2).requires_grad_(True)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = compiled(inputs())
        qmove.park(model)
        assert torch.equal(compiled(inputs()), expected)
    assert not qmove.is_parked(model)

    so_far = len(graphs)
    assert so_far > 0
    for _ in range(3):
        qmove.park(model)
        with torch.no_grad():
            assert torch.equal(compiled(inputs()), expected)
        gc.collect()
    assert len(graphs) == so_far


@pytest.mark.usefixtures("compiling")
def test_a_model_that_is_compiled_while_parked_wakes(gpu: GPU) -> None:
    model = layers(2)
    expected = model(inputs())
    qmove.park(model)

    compiled = torch.compile(model, backend="eager")

    assert torch.equal(compiled(inputs()), expected)
    assert not qmove.is_parked(model)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("kind", ["GraphModule", "parametrized", "compiled", "abstract base"])
def test_a_deep_copy_of_a_parked_module_of_that_kind_is_as_one_of_a_resident_one(
    gpu: GPU, kind: str
) -> None:
    model = KINDS[kind]().cuda()
    with torch.no_grad():
        expected = model(inputs())
    resident = copy.deepcopy(model)
    qmove.park(model)

    copied = copy.deepcopy(model)

    assert [base.__qualname__ for base in type(copied).__mro__] == [
        base.__qualname__ for base in type(resident).__mro__
    ]
    assert qmove.is_parked(model)
    with torch.no_grad():
        assert torch.equal(copied.cuda()(inputs()), expected)
        assert qmove.is_parked(model)
        assert torch.equal(model(inputs()), expected)


def test_a_class_that_is_given_while_parked_stays(gpu: GPU) -> None:
    model = layers(1)
    expected = model(inputs()) * 2
    qmove.park(model)

    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model[0].__class__ = Doubling

    assert torch.equal(model(inputs()), expected)
    assert type(model[0]) is Doubling


# Changed while parked ---------------------------------------------------------------------------------------------------


def test_what_is_loaded_while_parked_comes_home(gpu: GPU) -> None:
    model, other = layers(2), layers(2, device="cpu")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    parameters = list(model.parameters())
    qmove.park(model)

    model.load_state_dict(other.state_dict())

    assert torch.equal(model(inputs()).cpu(), other.cuda()(inputs()).cpu())
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    "wrap",
    [lambda model: model, lambda model: {"a": model}, lambda model: [model]],
    ids=["module", "dict", "list"],
)
@pytest.mark.parametrize("how", ["restored", "woken"])
def test_a_parameter_that_is_replaced_while_parked_goes_to_the_home_of_its_name(
    gpu: GPU, wrap: Any, how: str
) -> None:
    model = layers(2)
    root = wrap(model)
    qmove.park(root)

    model[1].bias = nn.Parameter(torch.full((64,), 3.0), requires_grad=False)
    if how == "restored":
        qmove.restore(root)
    else:
        model(inputs())

    assert model[1].bias.device == gpu.device
    assert torch.equal(model[1].bias, torch.full((64,), 3.0, device="cuda"))
    assert not qmove.is_parked(model)


def test_a_cast_of_a_parked_model_comes_home(gpu: GPU) -> None:
    model = layers(2)
    expected = layers(2).half()(inputs().half())
    qmove.park(model)

    model.half()

    assert torch.equal(model(inputs().half()), expected)
    assert {parameter.device for parameter in model.parameters()} == {gpu.device}


def test_plain_to_brings_a_parked_model_home_as_well(gpu: GPU) -> None:
    model = layers(2)
    expected = model(inputs())
    qmove.park(model)

    model.to("cuda")

    assert torch.equal(model(inputs()), expected)
    assert not qmove.is_parked(model)
    assert type(model[0]) is nn.Linear


# Forgotten while parked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        layers,
        lambda: {"a": layers()},
        lambda: torch.fx.symbolic_trace(layers()),
        lambda: [torch.ones(9, device="cuda")],
    ],
    ids=["module", "dict", "GraphModule", "list of tensors"],
)
def test_a_parked_model_that_is_deleted_leaves_nothing(gpu: GPU, build: Callable[[], Any]) -> None:
    empty = gpu.allocated()
    model = build()
    qmove.park(model)
    assert arena.bytes_in_use() > 0
    assert len(qmove.parked_models()) == 1

    del model
    gc.collect()

    assert arena.bytes_in_use() == 0
    assert qmove.parked_models() == []
    assert gpu.allocated() == empty


# A part and the whole ---------------------------------------------------------------------------------------------------


def test_a_part_is_parked_and_then_the_whole(gpu: GPU) -> None:
    empty = gpu.allocated()
    pipe = tiny_stable_diffusion()
    before, nbytes = snapshot(pipe), gpu.allocated() - empty

    first = qmove.park(pipe.unet)
    assert gpu.allocated() == empty + nbytes - first.nbytes
    second = qmove.park(pipe)
    assert first.nbytes + second.nbytes == nbytes
    assert gpu.allocated() == empty

    qmove.restore(pipe)
    assert snapshot(pipe) == before
    assert qmove.parked_models() == []


def test_a_part_of_what_is_parked_comes_home_alone(gpu: GPU) -> None:
    empty = gpu.allocated()
    pipe = tiny_stable_diffusion()
    before = snapshot(pipe)
    qmove.park(pipe)

    qmove.restore(pipe.unet)

    assert not qmove.is_parked(pipe.unet)
    assert qmove.is_parked(pipe.vae)
    assert qmove.is_parked(pipe)
    assert gpu.allocated() == empty + sum(parameter.nbytes for parameter in pipe.unet.parameters())
    with torch.no_grad():
        pipe.vae.decode(torch.ones(1, 4, 8, 8, device="cuda"))  # wakes what is still asleep
    assert snapshot(pipe) == before


def test_a_part_that_was_parked_on_its_own_wakes_alone(gpu: GPU) -> None:
    model = layers(2)
    qmove.park(model[0])
    qmove.park(model)

    model[0](inputs())
    assert (model[0].weight.device, model[1].weight.device) == (gpu.device, torch.device("cpu"))

    model(inputs())
    assert model[1].weight.device == gpu.device


# Context managers -------------------------------------------------------------------------------------------------------


def run(body: Callable[[], None], fails: bool) -> None:
    """Runs `body`, which raises a KeyError if it is to fail."""
    if fails:
        with pytest.raises(KeyError, match="from the body"):
            body()
    else:
        body()


@pytest.mark.parametrize("fails", [False, True])
def test_parked_keeps_a_model_out_of_vram_for_a_while(gpu: GPU, fails: bool) -> None:
    empty = gpu.allocated()
    model = layers(2)
    before = snapshot(model)

    def body() -> None:
        with qmove.parked(model) as parked:
            assert parked.nbytes > 0
            assert gpu.allocated() == empty
            if fails:
                raise KeyError("from the body")

    run(body, fails)
    assert snapshot(model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_resident_keeps_a_parked_model_awake_for_a_while(gpu: GPU, fails: bool) -> None:
    empty = gpu.allocated()
    model = layers(2)
    momentum = {"momentum": torch.ones(64, device="cuda")}
    qmove.park(model, extra=[momentum])

    def body() -> None:
        with qmove.resident(model):
            assert model[0].weight.device == momentum["momentum"].device == gpu.device
            if fails:
                raise KeyError("from the body")

    run(body, fails)
    assert qmove.is_parked(model)
    assert gpu.allocated() == empty
    model(inputs())
    assert momentum["momentum"].device == gpu.device


def test_resident_does_nothing_to_a_model_that_is_at_home(gpu: GPU) -> None:
    model = layers(2)
    before = snapshot(model)

    with qmove.resident(model) as restored:
        assert restored.nbytes == 0

    assert snapshot(model) == before
    assert not qmove.is_parked(model)

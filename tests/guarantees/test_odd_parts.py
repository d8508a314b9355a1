"""One part that cannot be moved stays where it is and is named; the rest of the model is parked."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm"),
    pytest.mark.filterwarnings("ignore:Sparse"),
]


class Wrapper(torch.Tensor):
    """A wrapper subclass whose inner tensor nobody can ask for."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("not needed here")


class Raising(Wrapper):
    def __tensor_flatten__(self) -> Any:
        raise RuntimeError("no inner tensors today")


def fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(8, device="cuda")


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "no flatten": (lambda: Wrapper(torch.ones(3, device="cuda")), "__tensor_flatten__"),
    "raising flatten": (
        lambda: Raising(torch.ones(3, device="cuda")),
        "raises RuntimeError: no inner tensors today",
    ),
    "fake": (fake, "FakeTensor"),
    "COO": (lambda: torch.eye(3).to_sparse().cuda(), "sparse_coo"),
    "CSR": (lambda: torch.eye(4).to_sparse_csr().cuda(), "sparse_csr"),
    "BSR": (lambda: torch.eye(4).to_sparse_bsr((2, 2)).cuda(), "sparse_bsr"),
    "nested": (
        lambda: torch.nested.as_nested_tensor(
            [torch.ones(2, device="cuda"), torch.ones(3, device="cuda")]
        ),
        "jagged",
    ),
}


def model_with(odd: Any) -> nn.Module:
    model = layers(2)
    model[1].odd = odd
    return model


def built(name: str) -> Any:
    try:
        return ODD[name][0]()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this device makes none: {error}")


@pytest.mark.parametrize("name", ODD)
def test_the_rest_is_parked_and_the_part_is_named(gpu: GPU, name: str) -> None:
    odd = built(name)
    model = model_with(odd)
    before, x = snapshot(model), torch.ones(1, 64, device=gpu.device)
    expected = model(x)

    parked = qmove.park(model, allow_live_graph=True)

    (left,) = [straggler for straggler in parked.stragglers if straggler.name == "1.odd"]
    assert left.device == gpu.device and ODD[name][1] in left.holders[0]
    assert model[1].odd is odd
    assert qmove.inventory(model).by_device.keys() == {"cpu"}
    assert torch.equal(model(x), expected)
    assert not qmove.is_parked(model)
    assert snapshot(model) == before
    qmove.park(model, allow_live_graph=True)
    qmove.restore(model, stream=True)
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ODD)
def test_strict_refuses_and_nothing_moves(gpu: GPU, name: str) -> None:
    model = model_with(built(name))
    before = snapshot(model)
    with pytest.raises(qmove.CannotMove, match=r"1\.odd"):
        qmove.park(model, strict=True)
    with pytest.raises(qmove.CannotMove, match=r"1\.odd"):
        qmove.move(model, "cpu")
    assert snapshot(model) == before


@pytest.mark.parametrize("place", ["attribute", "list", "numpy"])
def test_an_odd_part_is_found_wherever_it_is_kept(gpu: GPU, place: str) -> None:
    odd = torch.eye(4).to_sparse_csr().cuda()
    kept: Any = {"attribute": odd, "list": [odd], "numpy": np.empty(1, dtype=object)}[place]
    if place == "numpy":
        kept[0] = odd
    assert len(qmove.park(model_with(kept)).stragglers) == 1


def test_tensors_in_a_numpy_array_of_objects_are_parked(gpu: GPU) -> None:
    before = gpu.allocated()
    model = layers(1)
    model.table = np.empty((2, 2), dtype=object)
    for index in np.ndindex(2, 2):
        model.table[index] = torch.full((256,), float(sum(index)), device=gpu.device)
    qmove.park(model)
    assert gpu.allocated() == before
    assert "table[3]" in str(qmove.inventory(model).to_dict())
    qmove.restore(model)
    assert model.table[1, 1].device == gpu.device and model.table[1, 1].sum() == 512


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_old_norms_need_no_graph_and_give_the_same_after(gpu: GPU, norm: str) -> None:
    torch.manual_seed(0)
    make = getattr(torch.nn.utils, norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(make(nn.Linear(64, 64)), nn.ReLU()).cuda()
    model.eval()
    x = torch.ones(1, 64, device=gpu.device)
    expected = model(x).detach()
    for _ in range(2):
        assert qmove.park(model).nbytes
        assert torch.equal(model(x).detach(), expected)
    output = model(x)
    with pytest.raises(qmove.LiveAutogradGraph):
        qmove.park(model)
    output.sum().backward()


def test_a_property_that_raises_hinders_nobody(gpu: GPU) -> None:
    class Touchy(nn.Linear):
        @property
        def cache(self) -> Any:
            raise RuntimeError("not now")

    class Closed:
        @property
        def __dict__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("closed")

    model = nn.Sequential(Touchy(8, 8)).cuda()
    model.helper = Closed()
    before = snapshot(model)
    assert qmove.park(model).stragglers == []
    qmove.restore(model)
    assert snapshot(model) == before


# Raw addresses


def plain(number: int) -> Any:
    return number


ADDRESSES: dict[str, Callable[[int], Any]] = {
    "integer": plain,
    "list": lambda number: [0, number],
    "tuple in a dict": lambda number: {"handles": (number,)},
    "key of a dict": lambda number: {number: "weight"},
    "tensor on the device": lambda number: torch.tensor([number, 0], device="cuda"),
    "tensor on the host": lambda number: torch.tensor([[number]]),
    "ctypes pointer": lambda number: ctypes.c_void_p(number),
    "typed pointer": lambda number: ctypes.cast(number, ctypes.POINTER(ctypes.c_float)),
    "ctypes array": lambda number: (ctypes.c_uint64 * 2)(0, number),
    "array of pointers": lambda number: (ctypes.c_void_p * 1)(number),
    "numpy array": lambda number: np.array([number], dtype=np.int64),
    "numpy unsigned": lambda number: np.array([number], dtype=np.uint64),
    "numpy scalar": lambda number: np.int64(number),
    "an object's attribute": lambda number: type("Kernel", (), {})(),
}


@pytest.mark.parametrize("kept", ADDRESSES)
@pytest.mark.parametrize("offset", [0, 64])
def test_a_storage_whose_address_is_kept_stays_and_the_rest_is_parked(
    gpu: GPU, kept: str, offset: int
) -> None:
    model = layers(2)
    weight, number = model[0].weight, model[0].weight.data_ptr() + offset
    model.handle = ADDRESSES[kept](number)
    if kept == "an object's attribute":
        model.handle.pointer = number
    before = snapshot(model)

    parked = qmove.park(model)

    (left,) = parked.stragglers
    assert (left.name, left.device, left.nbytes) == ("0.weight", gpu.device, weight.nbytes)
    assert "handle" in left.holders[0] and "raw address" in left.holders[0]
    assert weight.data_ptr() == number - offset
    assert sorted(qmove.inventory(model).by_device) == ["cpu", "cuda:0"] or "device" in kept
    qmove.restore(model)
    assert snapshot(model) == before
    with pytest.raises(qmove.CannotMove, match=r"0\.weight: .*handle.* raw address"):
        qmove.park(model, strict=True)
    with pytest.raises(qmove.CannotMove, match=r"0\.weight: .*raw address"):
        qmove.move(model, "cpu")
    assert snapshot(model) == before


def test_numbers_that_are_no_addresses_hinder_nothing(gpu: GPU) -> None:
    model = layers(2)
    end = model[1].weight.data_ptr() + model[1].weight.nbytes
    model.steps, model.seed, model.at_the_end = 12345, 2**63, end + (1 << 40)
    model.table = torch.arange(1000, device=gpu.device)
    model.sizes, model.flag, model.none = {4096: 1, -1: 2}, True, ctypes.c_void_p(None)
    assert qmove.park(model).stragglers == []


def test_addresses_by_which_accelerate_tells_tied_weights_hinder_nothing(gpu: GPU) -> None:
    class Hook:
        pass

    model, hook = layers(2), Hook()
    address = model[0].weight.data_ptr()
    vars(hook).update(
        tied_params_map={address: {}}, tied_pointers_to_remove={(address, gpu.device)}
    )
    model[0]._hf_hook = hook
    assert qmove.park(model).stragglers == []


@pytest.mark.parametrize(
    ("cls_module", "attribute", "handle"),
    [
        ("auto_gptq.nn_modules.qlinear.qlinear_exllama", "q4", 17),
        ("awq.modules.linear.exllamav2", "q_handle", 17),
        ("somebodys.kernels", "q_handle", 0x7F12_3456_7890),
        ("somebodys.kernels", "q4", 0x7F12_3456_7890),
        ("gptqmodel.nn_modules.qlinear.bitblas", "q_params", [ctypes.c_void_p(0x7F12_3456_7890)]),
        ("somebodys.kernels", "q_params", [ctypes.c_void_p(0x7F12_3456_7890)]),
    ],
)
def test_handles_known_by_their_names_keep_a_layer_where_it_is(
    gpu: GPU, cls_module: str, attribute: str, handle: object
) -> None:
    layer = type("QuantLinear", (nn.Linear,), {"__module__": cls_module})(8, 8).cuda()
    model = nn.Sequential(layer, nn.Linear(8, 8).cuda())
    setattr(layer, attribute, None)
    assert qmove.park(model).stragglers == []
    qmove.restore(model)
    setattr(layer, attribute, handle)
    assert {left.name for left in qmove.park(model).stragglers} == {"0.weight", "0.bias"}


def test_a_paged_optimizer_of_bitsandbytes_keeps_its_managed_memory(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU tensor to PyTorch, over memory that the driver pages. `get_paged` is the library's own;
    only the driver's call is a stand-in."""
    from bitsandbytes import functional

    class Library:
        memory = (ctypes.c_char * 4096)()

        def cget_managed_ptr(self, nbytes: ctypes.c_size_t) -> int:
            assert nbytes.value <= len(self.memory)
            return ctypes.addressof(self.memory)

    monkeypatch.setattr(functional, "lib", Library())
    managed = functional.get_paged(512, dtype=torch.float32, device=gpu.device)
    managed.fill_(3)
    address = managed.data_ptr()
    weight = nn.Parameter(torch.ones(8, device="cuda"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight] = {"state1": managed, "step": 1}
    resident = gpu.allocated()

    assert [item.name for item in qmove.inventory(optimizer).immovable if "paged" in item.reason]
    qmove.park(optimizer)
    assert gpu.allocated() == 0
    qmove.restore(optimizer)
    with pytest.raises(qmove.CannotMove, match="paged optimizer of bitsandbytes"):
        qmove.move(optimizer, "cuda")
    state = optimizer.state[weight]["state1"]
    assert state is managed and state.data_ptr() == address and state.is_paged
    assert gpu.allocated() == resident and weight.is_cuda


@pytest.mark.parametrize("value", [4, True, "q4", [1, 2], {"bits": 4}])
def test_settings_under_such_a_name_hinder_nothing(gpu: GPU, value: object) -> None:
    model = layers(1)
    model[0].q4 = model[0].q_params = value
    assert qmove.park(model).stragglers == []


@pytest.mark.parametrize("name", ["ExllamaV2QuantLinear", "WQLinear_Exllama", "BitBLASQuantLinear"])
def test_layers_known_to_keep_addresses_in_cpp_stay(gpu: GPU, name: str) -> None:
    layer = type(name, (nn.Linear,), {})(8, 8).cuda()
    model = nn.Sequential(layer, nn.Linear(8, 8).cuda())
    assert qmove.park(model).stragglers == [], "its kernel has none yet"
    qmove.restore(model)
    layer.q_handle = 17
    parked = qmove.park(model)
    assert {left.name for left in parked.stragglers} == {"0.weight", "0.bias"}
    assert all(f"the kernel of 0 ({name})" in left.holders[0] for left in parked.stragglers)
    assert parked.nbytes == model[1].weight.nbytes + model[1].bias.nbytes

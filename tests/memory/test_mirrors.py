"""Mirrors: parking again copies what was changed since and nothing else, and what comes home is always right."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.digests import digest
from qmove_core.digests.digest_tree import PIECE, PRODUCT, SPARE
from qmove_core.memory import arena, budget, giving_back, mirrors
from qmove_core.model import kinds
from tests.builders.device import GPU
from tests.builders.models import (
    layers,
    llama_inputs,
    quanto_layers,
    snapshot,
    tiny_llama,
    torchao_layers,
)
from tests.guarantees.test_atomic import Interrupted, ctrl_c_at_line
from tests.guarantees.test_exact import BUILDERS

pytestmark = pytest.mark.simulated

WIDTH = 512
WEIGHT, BIAS = WIDTH * WIDTH * 4, WIDTH * 4  # bytes


@contextmanager
def copies() -> Iterator[list[simcuda.CopyNotice]]:
    """Notes each copy over the link."""
    seen: list[simcuda.CopyNotice] = []
    with simcuda.on_copy(seen.append):
        yield seen


def digest_bytes(model: object) -> int:
    """What reading the digests of all storages on accelerators brings over the link, at most."""
    assert digest.available(torch.device("cuda", 0))  # tried out before, which is read too
    away = [holding for holding in qmove.inventory(model).holdings if holding.device.type != "cpu"]
    return PRODUCT * (SPARE + sum(-(-holding.nbytes // PIECE) for holding in away))


def contents(model: object) -> dict[str, bytes]:
    """The bytes of every storage, wherever it is."""
    return {
        name: content[1]
        for name, content in snapshot(model).items()
        if isinstance(content[1], bytes)
    }


def round_trip(model: object) -> None:
    qmove.park(model)
    qmove.restore(model)


def mirrored(count: int = 4, width: int = WIDTH) -> nn.Sequential:
    """A resident model with mirrors, of `2 * count` storages."""
    model = layers(count, width=width)
    round_trip(model)
    return model


def ones(width: int = WIDTH) -> torch.Tensor:
    return torch.ones(1, width, device="cuda")


# Unchanged: nothing is copied -----------------------------------------------------------------------------------------


def test_the_second_park_brings_digests_over_the_link_and_nothing_else(gpu: GPU) -> None:
    model = layers(4, width=WIDTH)
    before = contents(model)
    first = qmove.park(model)
    assert first.copied_bytes == first.nbytes == 4 * (WEIGHT + BIAS)
    first.restore()
    read = digest_bytes(model)
    simcuda.reset_counters()

    second = qmove.park(model)

    counters = simcuda.counters()
    assert (second.copied_bytes, second.nbytes) == (0, first.nbytes)
    assert (counters.h2d_bytes, counters.d2d_bytes) == (0, 0)
    assert 0 < counters.d2h_bytes <= read < BIAS * 4
    assert simcuda.host_counters().pins == 0
    assert gpu.allocated() == 0
    assert contents(model) == before


def round_trips_copy_nothing_after_the_first(model: object) -> None:
    before, parked = snapshot(model), qmove.park(model)
    assert parked.copied_bytes == parked.nbytes > 0
    parked.restore()
    for _ in range(2):
        with copies() as seen:
            again = qmove.park(model)
        assert (again.copied_bytes, again.nbytes) == (0, parked.nbytes)
        assert {notice.direction for notice in seen} == {"d2h"}
        assert contents(model) == {
            name: c[1] for name, c in before.items() if isinstance(c[1], bytes)
        }
        again.restore()
    assert snapshot(model) == before


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("inside_inference_mode", [False, True])
def test_tensors_of_all_kinds_are_copied_once(
    gpu: GPU, build: Callable[[], nn.Module], inside_inference_mode: bool
) -> None:
    with torch.inference_mode(inside_inference_mode):
        round_trips_copy_nothing_after_the_first(build())


@pytest.mark.parametrize("kind", ["int8", "int4", "float8", "nf4"])
def test_torchao_weights_are_copied_once(gpu: GPU, kind: str) -> None:
    round_trips_copy_nothing_after_the_first(torchao_layers(kind))


@pytest.mark.parametrize("kind", ["qint8", "qint4", "qfloat8"])
def test_quanto_weights_are_copied_once(gpu: GPU, kind: str) -> None:
    round_trips_copy_nothing_after_the_first(quanto_layers(kind))


@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_a_llama_that_computes_between_its_parks_is_copied_once(
    gpu: GPU, precision: str, tmp_path: Any
) -> None:
    model = tiny_llama(precision, tmp_path)
    with torch.no_grad():
        expected = model(llama_inputs()).logits
        round_trip(model)
        for _ in range(2):
            assert torch.equal(model(llama_inputs()).logits, expected)
            assert qmove.park(model).copied_bytes == 0
    assert torch.equal(
        model.generate(llama_inputs(), max_new_tokens=1, do_sample=False)[:, -1],
        expected[:, -1].argmax(-1),
    )


def test_each_device_of_a_spread_model_finds_its_mirrors(gpu: GPU, second_gpu: GPU) -> None:
    model = nn.Sequential(
        layers(1, device="cuda:0"), layers(1, device="cuda:1"), layers(1, device="cpu")
    )
    before = snapshot(model)
    round_trip(model)

    parked = qmove.park(model)

    assert (parked.copied_bytes, gpu.allocated(), second_gpu.allocated()) == (0, 0, 0)
    parked.restore()
    assert snapshot(model) == before


def test_a_mirror_goes_along_to_another_device(gpu: GPU, second_gpu: GPU) -> None:
    model = layers(2)
    before = contents(model)
    qmove.park(model).restore("cuda:1")

    assert qmove.park(model).copied_bytes == 0
    qmove.restore(model)
    assert contents(model) == before


def test_a_move_to_the_cpu_finds_the_mirrors_and_a_move_back_makes_them(gpu: GPU) -> None:
    model = mirrored(2)
    expected = model(ones()).cpu()
    assert qmove.move(model, "cpu").copied_bytes == 0
    torch.testing.assert_close(model(torch.ones(1, WIDTH)), expected)
    qmove.move(model, gpu.device)
    assert qmove.park(model).copied_bytes == 0


def test_ten_swaps_of_two_models_copy_each_out_once(gpu: GPU) -> None:
    models = [layers(2), layers(3)]
    before = [snapshot(model) for model in models]
    qmove.park(models[1])
    out = 0
    for turn in range(10):
        out += qmove.park(models[turn % 2]).copied_bytes
        qmove.restore(models[(turn + 1) % 2])
    assert out == qmove.inventory(models[0]).nbytes
    qmove.restore(models)
    assert [snapshot(model) for model in models] == before


# Changed: copied again, alone -----------------------------------------------------------------------------------------


def merge_lora(model: nn.Sequential, sign: int = 1) -> None:
    """Adds a low-rank product to two of the weights, in place, as LoRA loaders do it; whole numbers, so that it can be undone."""
    for layer in (model[0], model[2]):
        up, down = (
            torch.ones(WIDTH, 2, device=layer.weight.device),
            torch.ones(2, WIDTH, device=layer.weight.device),
        )
        layer.weight.data += sign * (up @ down)


def write_through_data(model: nn.Sequential) -> None:
    model[1].weight.data[3, 5] += 1


def write_one_byte(model: nn.Sequential) -> None:
    model[1].weight.data.view(torch.uint8)[-1, -1] ^= 1


def write_through_a_view(model: nn.Sequential) -> None:
    model[1].weight[7:9].t()[4].add_(1)


def write_through_the_storage(model: nn.Sequential) -> None:
    model[1].weight.untyped_storage()[WEIGHT - 1] = 77


def write_what_lies_in_many_pieces(model: nn.Sequential) -> None:
    model[1].weight.neg_()


def replace_the_weight(model: nn.Sequential) -> None:
    model[1].weight = nn.Parameter(torch.ones(WIDTH, WIDTH, device="cuda"), requires_grad=False)


def replace_the_data(model: nn.Sequential) -> None:
    model[1].weight.data = torch.ones(WIDTH, WIDTH, device="cuda")


CHANGES: list[tuple[Callable[[nn.Sequential], None], int]] = [
    (write_through_data, WEIGHT),
    (write_one_byte, WEIGHT),
    (write_through_a_view, WEIGHT),
    (write_through_the_storage, WEIGHT),
    (write_what_lies_in_many_pieces, WEIGHT),
    (replace_the_weight, WEIGHT),
    (replace_the_data, WEIGHT),
    (merge_lora, 2 * WEIGHT),
    (lambda model: model[2].bias.data.zero_(), BIAS),
]


@pytest.mark.parametrize(("change", "changed_bytes"), CHANGES)
def test_what_was_changed_is_copied_again_alone(
    gpu: GPU, change: Callable[[nn.Sequential], None], changed_bytes: int
) -> None:
    model = mirrored()
    before = contents(model)
    change(model)
    wanted = snapshot(model)
    names = {name for name, content in contents(model).items() if before[name] != content}
    assert sum(len(before[name]) for name in names) == changed_bytes
    read = digest_bytes(model)

    with copies() as seen:
        parked = qmove.park(model)

    assert parked.copied_bytes == changed_bytes
    assert changed_bytes <= sum(notice.nbytes for notice in seen) <= changed_bytes + read
    assert contents(model) == {name: content[1] for name, content in wanted.items()}
    parked.restore()
    assert snapshot(model) == wanted
    assert qmove.park(model).copied_bytes == 0


def test_a_view_outside_the_model_writes_to_the_models_bytes_before_and_after(gpu: GPU) -> None:
    model = layers(2, width=WIDTH)
    row = model[1].weight[3]
    for number in range(3):
        round_trip(model)
        row.fill_(number)
        assert model[1].weight[3].sum().item() == number * WIDTH
        assert qmove.park(model).copied_bytes == WEIGHT
        assert row.device.type == "cpu" and row.sum().item() == number * WIDTH
        qmove.restore(model)
    del row
    assert qmove.park(model).copied_bytes == 0
    qmove.restore(model)
    assert model[1].weight[3].sum().item() == 2 * WIDTH


def test_a_change_that_is_undone_is_none(gpu: GPU) -> None:
    model = mirrored()
    model[1].weight.data.neg_()
    model[1].weight.data.neg_()
    assert qmove.park(model).copied_bytes == 0


def test_a_change_made_while_parked_comes_home_and_the_next_park_copies_nothing(gpu: GPU) -> None:
    model = mirrored()
    qmove.park(model)
    merge_lora(model)
    model[1].bias.fill_(7)
    wanted = contents(model)

    qmove.restore(model)
    assert contents(model) == wanted

    assert qmove.park(model).copied_bytes == 0
    assert contents(model) == wanted
    qmove.restore(model)
    assert contents(model) == wanted


@pytest.mark.parametrize("parks_before", [1, 2])
def test_unmerged_on_the_device_what_was_merged_on_the_host(gpu: GPU, parks_before: int) -> None:
    model = layers(4, width=WIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1000).round_().add_(
                0
            )  # no -0, and whole numbers: what is added is taken away again without a trace
    before = contents(model)
    for _ in range(parks_before - 1):
        round_trip(model)
    qmove.park(model)
    merge_lora(model)
    qmove.restore(model)
    merge_lora(model, sign=-1)
    assert contents(model) == before

    parked = qmove.park(model)

    assert parked.copied_bytes == 2 * WEIGHT  # the mirrors hold the merged ones
    assert contents(model) == before
    parked.restore()
    assert contents(model) == before


def test_what_is_replaced_while_parked_comes_home_right(gpu: GPU) -> None:
    model = mirrored()
    qmove.park(model)
    model[1].weight = nn.Parameter(torch.full((WIDTH, WIDTH), 3.0), requires_grad=False)
    model[2].weight.data = torch.full((WIDTH, WIDTH), 4.0)
    wanted = contents(model)
    qmove.restore(model)
    assert contents(model) == wanted
    qmove.park(model)
    assert contents(model) == wanted


def test_a_weight_tied_between_two_models_is_right_in_both(gpu: GPU) -> None:
    first, second = layers(2, width=WIDTH), layers(2, width=WIDTH)
    second[0].weight = first[0].weight
    before = contents(first), contents(second)
    for turn in range(3):
        for model in (first, second):
            copied = qmove.park(model).copied_bytes
            assert copied == 0 or not turn
            assert (contents(first), contents(second)) == before
            qmove.restore([first, second])
    first[0].weight.data.add_(1)
    changed = contents(first), contents(second)
    assert qmove.park(second).copied_bytes == WEIGHT
    assert (contents(first), contents(second)) == changed
    qmove.restore([first, second])
    assert (contents(first), contents(second)) == changed


# Nobody else can write to a mirror --------------------------------------------------------------------------------------


class Alias:
    """Something that a user keeps of a parked weight, and can write through."""

    def __init__(self, kept: Any, write: Callable[[Any], object]) -> None:
        self.kept, self._write = kept, write

    def write(self) -> None:
        self._write(self.kept)


ALIASES: dict[str, Callable[[nn.Sequential], Alias]] = {
    "state_dict": lambda model: Alias(model.state_dict(), lambda state: state["1.weight"].fill_(9)),
    "detached view": lambda model: Alias(model[1].weight.detach()[3], lambda row: row.fill_(9)),
    "storage": lambda model: Alias(
        model[1].weight.untyped_storage(), lambda storage: storage.fill_(9)
    ),
    "typed storage": lambda model: Alias(
        model[1].weight.storage(), lambda storage: storage.fill_(9)
    ),
    "numpy view": lambda model: Alias(model[1].weight.numpy(), lambda array: array.fill(9)),
    "tensor over a numpy view": lambda model: Alias(
        torch.from_numpy(model[1].weight.numpy()), lambda tensor: tensor.fill_(9)
    ),
    "dlpack": lambda model: Alias(
        torch.from_dlpack(model[1].weight.detach()), lambda tensor: tensor.fill_(9)
    ),
    "set_": lambda model: Alias(
        torch.empty(0).set_(model[1].weight.detach()), lambda tensor: tensor.fill_(9)
    ),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("keep", ALIASES.values(), ids=ALIASES.keys())
def test_an_alias_of_the_parked_bytes_cannot_reach_a_later_park(
    gpu: GPU, keep: Callable[[Any], Alias]
) -> None:
    model = mirrored()
    before = contents(model)
    qmove.park(model)
    alias = keep(model)
    qmove.restore(model)
    alias.write()
    assert contents(model) == before

    parked = qmove.park(model)  # also what has never been looked at since the restore

    assert parked.copied_bytes == (parked.nbytes if keep is ALIASES["state_dict"] else WEIGHT)
    assert contents(model) == before
    alias.write()
    assert contents(model) == before
    parked.restore()
    alias.write()
    del alias
    assert qmove.park(model).copied_bytes == 0
    assert contents(model) == before
    qmove.restore(model)
    assert contents(model) == before


# RAM ------------------------------------------------------------------------------------------------------------------


def resident_and_mirrored(*counts: int) -> list[nn.Sequential]:
    """Models with mirrors, the first one restored first."""
    models = [layers(count) for count in counts]
    for model in models:
        round_trip(model)
    return models


def arena_bytes(model: object) -> int:
    return arena.bytes_for([holding.nbytes for holding in qmove.inventory(model).holdings])


def held() -> int:
    """Bytes of RAM that qmove has from the system."""
    return arena.bytes_in_use() + arena.spare_bytes()


def has_mirrors(model: object) -> bool:
    """Whether all storages of a resident model have one; asked of what decides it, and put back."""
    storages = [holding.storage for holding in qmove.inventory(model).holdings]
    found = mirrors.take(storages)
    mirrors.put_back(storages, found)
    assert len({mirror is None for mirror in found}) == 1, "some of them"
    return found[0] is not None


def test_stats_show_the_ram_that_mirrors_take(gpu: GPU) -> None:
    first, second = layers(2), layers(3)
    sizes = [arena_bytes(first), arena_bytes(second)]
    round_trip([first, second])
    assert (qmove.stats().mirror_bytes, qmove.stats().arena_bytes) == (sum(sizes), 0)
    qmove.park([first, second])
    assert (qmove.stats().mirror_bytes, qmove.stats().arena_bytes) == (0, sum(sizes))
    qmove.restore(first)
    assert (qmove.stats().mirror_bytes, qmove.stats().arena_bytes) == tuple(sizes)
    assert held() == sum(sizes)


def test_without_keep_mirrors_each_park_copies_and_no_ram_is_held(gpu: GPU) -> None:
    qmove.configure(keep_mirrors=False)
    model = layers(4)
    before = snapshot(model)
    for _ in range(2):
        parked = qmove.park(model)
        assert parked.copied_bytes == parked.nbytes
        parked.restore()
        assert (arena.bytes_in_use(), qmove.stats().mirror_bytes) == (0, 0)
    assert snapshot(model) == before


def test_mirrors_made_before_keep_mirrors_was_switched_off_end_with_the_next_restore(
    gpu: GPU,
) -> None:
    model = mirrored()
    before = snapshot(model)
    qmove.configure(keep_mirrors=False)
    round_trip(model)
    assert arena.bytes_in_use() == 0
    assert qmove.park(model).copied_bytes == 4 * (WEIGHT + BIAS)
    qmove.restore(model)
    assert snapshot(model) == before


def test_ram_limit_counts_mirrors_and_gives_the_least_recently_used_up_first(gpu: GPU) -> None:
    first, second, third = resident_and_mirrored(4, 4, 4)
    fourth = layers(4)
    round_trip(first)  # so that the second was used longest ago
    one = arena_bytes(first)
    qmove.configure(ram_limit=3 * one + one // 2)

    qmove.park(fourth)

    assert [has_mirrors(model) for model in (first, second, third)] == [True, False, True]
    assert held() == 3 * one


def test_what_is_parked_is_never_given_up(gpu: GPU) -> None:
    parked, resident = layers(4), layers(4)
    before = snapshot(parked)
    round_trip([parked, resident])
    qmove.park(parked)
    bytes_parked = contents(parked)

    assert qmove.trim() == arena_bytes(resident) or arena.bytes_in_use() == held()
    qmove.configure(ram_limit=arena_bytes(parked))
    with pytest.raises(qmove.NotEnoughMemory, match=r"ram_limit of qmove\.configure"):
        qmove.park(resident)

    assert contents(parked) == bytes_parked
    qmove.configure(ram_limit=None)
    qmove.restore(parked)
    assert snapshot(parked) == before


@pytest.fixture(params=["pinned", "pageable"])
def both_kinds_of_host_memory(request: pytest.FixtureRequest) -> None:
    if request.param == "pageable":
        qmove.configure(pin_limit=0)


@pytest.mark.usefixtures("both_kinds_of_host_memory")
@pytest.mark.parametrize("limit", ["ram_limit", "cgroup limit", "available RAM"])
def test_mirrors_are_given_up_before_a_park_fails(
    gpu: GPU, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored_one, other = layers(4), layers(3)
    before = snapshot(mirrored_one), snapshot(other)
    round_trip(mirrored_one)
    allowed = arena_bytes(mirrored_one)
    if limit == "ram_limit":
        qmove.configure(ram_limit=allowed)
    elif limit == "cgroup limit":
        monkeypatch.setattr(budget, "cgroup_free", lambda: allowed - held())
    else:
        real = psutil.virtual_memory()
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: real._replace(available=allowed - held())
        )

    parked = qmove.park(other)

    assert not has_mirrors(mirrored_one)
    assert held() <= allowed
    parked.restore()
    assert (snapshot(mirrored_one), snapshot(other)) == before


def test_a_model_that_is_parked_needs_no_room_beside_its_own_mirrors(gpu: GPU) -> None:
    model = mirrored()
    qmove.configure(ram_limit=held())
    model[1].weight.data.add_(1)
    wanted = contents(model)
    assert qmove.park(model).copied_bytes == WEIGHT
    assert contents(model) == wanted


@pytest.mark.usefixtures("both_kinds_of_host_memory")
def test_trim_gives_mirrors_back_and_says_how_much(gpu: GPU) -> None:
    model = mirrored()
    before, size = snapshot(model), arena_bytes(model)
    assert giving_back.held_back() == size

    assert qmove.trim() == size

    assert (held(), qmove.stats().mirror_bytes, qmove.trim()) == (0, 0, 0)
    assert qmove.park(model).copied_bytes == 4 * (WEIGHT + BIAS)
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.usefixtures("both_kinds_of_host_memory")
def test_trim_gives_no_more_mirrors_up_than_it_was_asked_for(gpu: GPU) -> None:
    models = resident_and_mirrored(2, 2, 2)
    one = arena_bytes(models[0])

    assert qmove.trim(one + 1) == 2 * one

    assert [has_mirrors(model) for model in models] == [False, False, True]


def test_the_mirror_of_a_model_that_is_deleted_goes_with_it(gpu: GPU) -> None:
    model, other = resident_and_mirrored(4, 2)
    del model
    gc.collect()
    assert qmove.stats().mirror_bytes == arena.bytes_in_use() == arena_bytes(other)


def test_the_mirror_of_a_weight_that_is_replaced_goes_with_it(gpu: GPU) -> None:
    model = mirrored()
    before = qmove.stats().mirror_bytes
    model[1].weight = nn.Parameter(torch.ones(2, WIDTH, device="cuda"), requires_grad=False)
    assert qmove.stats().mirror_bytes == before - WEIGHT


# Without digests ------------------------------------------------------------------------------------------------------


def test_a_device_with_no_room_for_digests_is_copied_from(gpu: GPU) -> None:
    model = mirrored()
    model[1].weight.data.add_(1)
    before = contents(model)
    simcuda.set_memory(torch.cuda.memory_allocated())

    parked = qmove.park(model)

    assert parked.copied_bytes == parked.nbytes
    assert contents(model) == before
    simcuda.set_memory("4GiB")
    parked.restore()
    assert contents(model) == before


def test_a_device_that_multiplies_inexactly_is_copied_from(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mirrored()
    before = contents(model)
    monkeypatch.setattr(
        digest, "_products", lambda device: None if device.type == "cuda" else digest.FloatProducts
    )
    for _ in range(2):
        parked = qmove.park(model)
        assert parked.copied_bytes == parked.nbytes
        assert contents(model) == before
        parked.restore()
    assert contents(model) == before


# Whatever fails, a mirror is true or it is gone -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_after_a_park_whose_nth_copy_failed_the_next_one_is_right(
    gpu: GPU, error: Any, late: bool, nth: int
) -> None:
    model = mirrored()
    model[1].weight.data.add_(1)
    model[3].weight.data.add_(1)
    before, allocated = snapshot(model), gpu.allocated()

    with (
        pytest.raises(error or RuntimeError),
        simcuda.fail("copy", nth=nth, error=error, late=late) as fault,
    ):
        qmove.park(model)

    assert fault.fired == 1
    assert (snapshot(model), gpu.allocated()) == (before, allocated)
    parked = qmove.park(model)
    assert parked.copied_bytes <= 2 * WEIGHT
    assert contents(model) == {name: content[1] for name, content in before.items()}
    parked.restore()
    assert snapshot(model) == before


def test_after_a_park_that_failed_when_all_was_copied_the_next_one_is_right(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mirrored()
    model[1].weight.data.add_(1)
    before = snapshot(model)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted"):
        refresh, calls = kinds.refresh, []

        def fails_once(held: Any) -> None:
            refresh(held)
            calls.append(held)
            if len(calls) == 1:
                raise RuntimeError("planted")

        patched.setattr(kinds, "refresh", fails_once)
        qmove.park(model)
    assert snapshot(model) == before

    model[2].weight.data.add_(1)
    wanted = snapshot(model)
    qmove.park(model)
    assert contents(model) == {name: content[1] for name, content in wanted.items()}
    qmove.restore(model)
    assert snapshot(model) == wanted


def test_a_park_that_does_not_fit_keeps_the_mirrors_it_has(gpu: GPU) -> None:
    model = mirrored()
    model.extra = torch.ones(1000, device="cuda")
    qmove.configure(ram_limit=held() + 100)
    with pytest.raises(qmove.NotEnoughMemory):
        qmove.park(model)
    qmove.configure(ram_limit=None)
    assert qmove.park(model).copied_bytes == 4000


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of a Ctrl-C in a finalizer
def test_ctrl_c_in_the_second_park_leaves_no_false_mirror(gpu: GPU) -> None:
    model = layers(1)
    round_trip(model)
    number, finished = 0, False
    while not finished:
        number += 11  # each line takes 30 s
        model[0].weight.data.add_(1)
        wanted = contents(model)
        try:
            with ctrl_c_at_line(number) as lines:
                qmove.park(model)
                finished = lines() < number
        except KeyboardInterrupt:
            pass
        assert contents(model) == wanted, number
        qmove.restore(model)
        assert contents(model) == wanted, number
        qmove.park(model)
        assert contents(model) == wanted, number
        qmove.restore(model)
    assert number > 100, "it did go through the lines of the park"

"""The simulation of a large service: what it counts adds up, and parking buys what it must."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.routing import POLICIES, Members, Setting, simulate

SMALL = Setting(replicas=40, models=400, requests=4000, requests_per_second=4.0)
AGAIN, VRAM, RAM = POLICIES


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_figures_which_add_up(policy: str) -> None:
    figures = simulate(SMALL, policy)
    assert figures == simulate(SMALL, policy) != simulate(replace(SMALL, seed=2), policy)
    assert sum(figures["found"].values()) == pytest.approx(1)
    assert SMALL.answer <= figures["p50"] <= figures["p99"]


def test_without_ram_parking_buys_nothing() -> None:
    assert simulate(replace(SMALL, in_ram=0), RAM) == simulate(SMALL, AGAIN)


def test_each_model_in_ram_is_one_load_less() -> None:
    loads = [simulate(replace(SMALL, in_ram=n), RAM)["found"]["storage"] for n in (0, 2, 8)]
    assert loads == sorted(loads, reverse=True) and loads[0] > loads[-1]


def test_a_single_replica_for_one_model_waits_in_line() -> None:
    one = replace(SMALL, replicas=1, models=1, requests=300, requests_per_second=1e9)
    figures = simulate(one, AGAIN)
    assert figures["found"] == {"VRAM": 1.0, "RAM": 0.0, "storage": 0.0}
    # The n-th of them waits for n answers and one load.
    assert figures["p99"] == pytest.approx(one.load + 100 + 198, abs=1)


def test_members_come_and_go() -> None:
    members = Members()
    for number in (3, 5, 7):
        members.add(number)
    members.discard(3)
    members.discard(7)
    members.add(9)
    assert sorted(members.numbers) == [5, 9]

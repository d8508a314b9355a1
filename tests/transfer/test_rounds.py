"""The rounds of a swap, in bytes: what they never do, and how little room is enough."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from qmove_core.transfer import rounds
from qmove_core.transfer.rounds import Item, Place, Rounds

GPU = "cuda:0"


def sizes_of(kind: str, total: int, chance: random.Random) -> list[int]:
    """Bytes of a model's storages."""
    found: list[int] = []
    while sum(found) < total:
        found.append({"same": 25, "two": chance.choice([1, 40])}.get(kind, chance.randint(1, 60)))
    return found


def require_apart(places: list[Place]) -> None:
    places = sorted(places, key=lambda place: (str(place.block), place.start))
    for one, other in pairwise(places):
        assert one.block != other.block or one.end <= other.start


class Twin:
    """Two models that take turns where the host has room for one and `ahead` largest storages."""

    def __init__(self, seed: int, kind: str, ahead: float) -> None:
        chance = random.Random(seed)
        self.home = sizes_of(kind, 400, chance)
        self.parked = sizes_of(kind, chance.choice([200, 400]), chance)
        starts = [sum(self.parked[:n]) for n in range(len(self.parked))]
        self.places = [Place("first", s, s + n) for s, n in zip(starts, self.parked, strict=True)]
        more = max(0, sum(self.home) - sum(self.parked))
        more += int(ahead * (max(self.home) + max(self.parked)))
        self.gaps = [Place("own", 0, more)]
        self.most_on_device = max(sum(self.home), sum(self.parked))

    def swap(self) -> bool:
        order = sorted(
            range(len(self.parked)), key=lambda n: (self.places[n].block, self.places[n].start)
        )
        coming = [Item(self.parked[n], GPU, place=self.places[n]) for n in order]
        leaving = [Item(nbytes, GPU, wanted=nbytes) for nbytes in self.home]
        free = self.most_on_device - sum(self.home)
        now = Rounds(leaving, coming, {GPU: free}, self.gaps)
        if not now.can_finish():
            return False
        lie: dict[int, Place] = {}
        there = {n: item.place for n, item in enumerate(coming) if item.place}
        while not now.is_done:
            this = now.next()
            if not this.out and not this.into:
                slides = now.close_gaps()
                assert slides
                for slide in slides:
                    assert slide.to.start < slide.start
                    (there if slide.is_coming else lie)[slide.number] = slide.to
            lie.update({n: place for n, place in this.out if place is not None})
            require_apart([*lie.values(), *there.values()])
            free -= sum(self.parked[order[n]] for n in this.into)
            assert free >= 0
            for number, _place in this.out:
                now.has_left(number)
                free += self.home[number]
            for number in this.into:
                now.has_come(number)
                del there[number]
        self.places = [lie[n] for n in range(len(self.home))]
        self.gaps = list(now._gaps)
        self.parked, self.home = self.home, self.parked
        return True


@pytest.mark.parametrize("kind", ["same", "two", "mixed"])
def test_models_take_turns_for_ever_in_room_for_one_and_twice_the_largest_storages(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "ROUND", 32)
    for seed in range(60):
        twin = Twin(seed, kind, ahead=2)
        assert all(twin.swap() for _swap in range(20)), seed


def test_storages_of_one_size_need_one_of_them_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "ROUND", 32)
    twin = Twin(0, "same", ahead=0.5)
    twin.gaps = [Place("own", 0, 25 + max(0, sum(twin.home) - sum(twin.parked)))]

    assert all(twin.swap() for _swap in range(20))


def test_a_swap_that_cannot_go_on_is_seen_before_it_begins() -> None:
    leaving = [Item(40, GPU, wanted=40), Item(40, GPU, wanted=40)]
    coming = [Item(50, GPU, place=Place("first", 0, 50))]

    assert not Rounds(leaving, coming, {GPU: 0}, [Place("own", 0, 40)]).can_finish()
    assert not Rounds(leaving, coming, {GPU: 0}, [Place("own", 0, 79)]).can_finish()
    assert Rounds(leaving, coming, {GPU: 10}, [Place("own", 0, 40)]).can_finish()
    assert Rounds(leaving, coming, {GPU: 0}, []).can_finish([Place("own", 0, 80)])


def test_gaps_that_are_too_small_are_closed_before_another_block_is_needed() -> None:
    """Two gaps of 20 around what comes, and what leaves has 40."""
    leaving = [Item(40, GPU, wanted=40)]
    coming = [Item(30, GPU, place=Place("first", 20, 50))]
    now = Rounds(leaving, coming, {GPU: 0}, [Place("first", 0, 20), Place("first", 50, 70)])

    assert now.next().out == []
    (slide,) = now.close_gaps()
    assert (slide.start, slide.to) == (20, Place("first", 0, 30))
    assert now.next().out == [(0, Place("first", 30, 70))]


def test_what_stays_in_a_block_is_not_moved_and_nothing_moves_over_it() -> None:
    coming = [Item(30, GPU, place=Place("first", 60, 90)), Item(10, GPU)]
    now = Rounds([], coming, {GPU: 0}, [Place("first", 0, 20), Place("first", 50, 60)])

    (slide,) = now.close_gaps()  # 20 to 50 is somebody else's
    assert slide.to == Place("first", 50, 80)
    assert now.close_gaps() == []

"""How many nodes must run before each that remains: what decides which model goes first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, strategies
from qmove_pack.nodes.host import graph


def nodes_of(links: dict[str, list[str]], **outside: int) -> Any:
    """A graph from each node to those that it waits for; `outside` says what else it waits for."""
    blocking: dict[str, dict[str, bool]] = {node_id: {} for node_id in links}
    for node_id, sources in links.items():
        for source in sources:
            blocking.setdefault(source, {})[node_id] = True
    counts = {n: len(set(sources)) + outside.get(n, 0) for n, sources in links.items()}
    pending = dict.fromkeys(links, True)
    return SimpleNamespace(pendingNodes=pending, blocking=blocking, blockCount=counts)


def test_what_waits_for_something_outside_comes_after_all_that_does_not() -> None:
    links = {"a": [], "b": ["a"], "c": ["b"], "end": [], "behind": ["end"]}

    steps = graph.steps_ahead(nodes_of(links, end=1))

    assert sorted(steps, key=steps.__getitem__) == ["a", "b", "c", "end", "behind"]


def test_a_host_without_counts_and_a_circle_do_no_harm() -> None:
    nodes = nodes_of({"a": ["b"], "b": ["a"], "c": ["a"]})
    del nodes.blockCount

    assert set(graph.steps_ahead(nodes)) == {"a", "b", "c"}


@given(strategies.lists(strategies.sets(strategies.integers(0, 11)), max_size=12))
def test_it_counts_all_that_come_before(sources: list[set[int]]) -> None:
    links = {
        str(index): [str(source) for source in before if source < index]
        for index, before in enumerate(sources)
    }

    def all_before(node_id: str) -> set[str]:
        return {node_id for s in links[node_id] for node_id in (s, *all_before(s))}

    assert graph.steps_ahead(nodes_of(links)) == {n: len(all_before(n)) for n in links}

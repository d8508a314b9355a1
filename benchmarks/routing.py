"""What parking buys a large service: a simulation of 1,000 replicas and 10,000 models.

    python -m benchmarks.routing           # a few minutes; writes docs/routing.svg and
    python -m benchmarks.routing --quick   # docs/results/routing.json; --quick: only whether it works

Discrete: requests come at random times (Poisson), for models that are asked for unevenly (Zipf).
Each replica has one GPU, answers one request after another, and keeps what it used last in VRAM,
and with parking more of it in RAM. The times are measured ones, scaled to the size of the models:
no GPU computes here. A router sends a request to a replica that has its model in VRAM, unless too
many wait there; what else it knows is what the policies differ in.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class Setting:
    """Attributes:
    gigabytes: of each model.
    link: GB/s over which a parked model comes home: PCIe 4 x16, less the 6 % that qmove measured.
    storage: GB/s at which a checkpoint becomes a model in VRAM: 81 GB in 100 s from an NVMe disk,
        as the request behind qmove tells.
    answer: seconds that a request computes.
    in_vram, in_ram: models that a replica has room for.
    zipf: how uneven the requests are: the n-th most wanted model gets 1/n^zipf of the first.
    """

    replicas: int = 1000
    models: int = 10_000
    requests_per_second: float = 100.0
    requests: int = 300_000
    gigabytes: float = 16.0
    link: float = 25.0 / 1.06
    storage: float = 81 / 100
    answer: float = 1.0
    in_vram: int = 1
    in_ram: int = 16
    zipf: float = 1.0
    seed: int = 1

    @property
    def wake(self) -> float:
        """Seconds to bring a parked model home. To park an unchanged one costs about 1 % of it."""
        return 1.01 * self.gigabytes / self.link

    @property
    def load(self) -> float:
        return self.gigabytes / self.storage


# in_ram of the setting is used; the router looks for a replica that has the model in RAM.
POLICIES: dict[str, tuple[bool, bool]] = {
    "load again": (False, False),
    "park, router knows VRAM": (True, False),
    "park, router knows RAM": (True, True),
}


class Members:
    """Replicas that have a model: added, discarded and picked at random in no time."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._at: dict[int, int] = {}

    def add(self, number: int) -> None:
        self._at[number] = len(self.numbers)
        self.numbers.append(number)

    def discard(self, number: int) -> None:
        at, last = self._at.pop(number), self.numbers.pop()
        if last != number:
            self.numbers[at], self._at[last] = last, at


class Replicas:
    """All replicas: until when each is busy, and which models it has."""

    def __init__(self, setting: Setting, parks: bool) -> None:
        self.busy_until = [0.0] * setting.replicas
        self.worked = 0.0
        self._in_vram = setting.in_vram
        self._in_ram = setting.in_ram if parks else 0
        self._vram: list[OrderedDict[int, None]] = [OrderedDict() for _ in self.busy_until]
        self._ram: list[OrderedDict[int, None]] = [OrderedDict() for _ in self.busy_until]
        self.with_vram: defaultdict[int, Members] = defaultdict(Members)
        self.with_ram: defaultdict[int, Members] = defaultdict(Members)

    def use(self, replica: int, model: int) -> str:
        """The replica's next request is for this model. Returns where it was."""
        vram, ram = self._vram[replica], self._ram[replica]
        if model in vram:
            vram.move_to_end(model)
            return "VRAM"
        found = "storage"
        if model in ram:
            found = "RAM"
            del ram[model]
            self.with_ram[model].discard(replica)
        if len(vram) == self._in_vram:
            leaves, _ = vram.popitem(last=False)
            self.with_vram[leaves].discard(replica)
            if self._in_ram:
                ram[leaves] = None
                self.with_ram[leaves].add(replica)
        if len(ram) > self._in_ram:
            gone, _ = ram.popitem(last=False)
            self.with_ram[gone].discard(replica)
        vram[model] = None
        self.with_vram[model].add(replica)
        return found

    def earliest(self, among: Sequence[int], rng: random.Random) -> int:
        """The one that is free first, of a few that are looked at."""
        count = len(among)
        few = among if count <= 8 else [among[int(rng.random() * count)] for _ in range(8)]
        return min(few, key=self.busy_until.__getitem__)


def simulate(setting: Setting, policy: str) -> dict[str, Any]:
    """Seconds from a request to its answer, where models were, and how busy replicas were."""
    parks, knows_ram = POLICIES[policy]
    rng, replicas = random.Random(setting.seed), Replicas(setting, parks)
    everybody = range(setting.replicas)
    weights = [1 / rank**setting.zipf for rank in range(1, setting.models + 1)]
    asked = rng.choices(
        range(setting.models), cum_weights=list(itertools.accumulate(weights)), k=setting.requests
    )
    cost = {"VRAM": 0.0, "RAM": setting.wake, "storage": setting.load}
    found: defaultdict[str, int] = defaultdict(int)
    took: list[float] = []
    now, warm = 0.0, setting.requests // 3  # until then caches fill
    for number, model in enumerate(asked):
        now += rng.expovariate(setting.requests_per_second)
        # A replica is chosen by when the answer would be there.
        choices = [(replicas.earliest(everybody, rng), cost["storage"])]
        if having := replicas.with_vram[model].numbers:
            choices.append((replicas.earliest(having, rng), 0.0))
        if knows_ram and (having := replicas.with_ram[model].numbers):
            choices.append((replicas.earliest(having, rng), cost["RAM"]))
        replica, _ = min(choices, key=lambda c: max(replicas.busy_until[c[0]], now) + c[1])
        where = replicas.use(replica, model)
        begins = max(now, replicas.busy_until[replica])
        ends = begins + cost[where] + setting.answer
        replicas.busy_until[replica] = ends
        if number >= warm:
            found[where] += 1
            replicas.worked += ends - begins
            took.append(ends - now)
    took.sort()
    span = now * (1 - warm / setting.requests)
    return {
        "p50": took[len(took) // 2],
        "p99": took[len(took) * 99 // 100],
        "busy": replicas.worked / (span * setting.replicas),
        "found": {where: found[where] / len(took) for where in cost},
    }


def replicas_needed(setting: Setting, policy: str, p99: float) -> int | None:
    """The fewest replicas that keep 99 of 100 requests within `p99` seconds, within 2 %; None if
    8 times as many as the setting has do not."""
    low, high = 1, setting.replicas
    while simulate(replace(setting, replicas=high), policy)["p99"] > p99:
        low, high = high, high * 2
        if high > 8 * setting.replicas:
            return None
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        if simulate(replace(setting, replicas=middle), policy)["p99"] > p99:
            low = middle
        else:
            high = middle
    return high


def measure(setting: Setting) -> dict[str, Any]:
    """Everything that the page shows."""
    loads = [
        setting.requests_per_second * share for share in (0.2, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0)
    ]
    by_load = {
        policy: [simulate(replace(setting, requests_per_second=load), policy) for load in loads]
        for policy in POLICIES
    }
    small = replace(
        setting,
        replicas=setting.replicas // 4,
        models=setting.models // 4,
        requests_per_second=setting.requests_per_second / 4,
        requests=setting.requests // 4,
    )
    target = 2 * setting.load + setting.answer
    needed = {policy: replicas_needed(small, policy, target) for policy in POLICIES}
    sweeps: dict[str, tuple[str, list[float]]] = {
        "storage, GB/s": ("storage", [0.4, 0.81, 2, 5, 10, 20, 40]),
        "models in RAM": ("in_ram", [0, 1, 2, 4, 8, 16, 32, 64]),
        "Zipf exponent": ("zipf", [0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0]),
        "seconds of an answer": ("answer", [0.1, 0.3, 1, 3, 10, 30]),
    }
    gains = {}
    for title, (name, values) in sweeps.items():
        pairs = []
        for value in values:
            changed = replace(setting, **{name: int(value) if name == "in_ram" else value})
            # As busy as replicas are that only answer: else a slow answer alone fills them.
            share = setting.answer / changed.answer
            rate = setting.requests_per_second * min(1.0, share) / 2
            changed = replace(changed, requests_per_second=rate, requests=setting.requests // 2)
            again, parked = (simulate(changed, p) for p in (first(POLICIES), last(POLICIES)))
            pairs.append(
                {
                    "value": value,
                    "gpu_seconds_saved": 1 - parked["busy"] / again["busy"],
                    "p50": [again["p50"], parked["p50"]],
                    "p99": [again["p99"], parked["p99"]],
                }
            )
        gains[title] = pairs
    return {
        "setting": asdict(setting) | {"wake": setting.wake, "load": setting.load},
        "loads": loads,
        "by_load": by_load,
        "gpus": {"p99": target, "requests_per_second": small.requests_per_second, "needed": needed},
        "gains": gains,
    }


def first(names: dict[str, Any]) -> str:
    return next(iter(names))


def last(names: dict[str, Any]) -> str:
    return list(names)[-1]


def draw(results: dict[str, Any], path: Path) -> None:
    """The picture of docs/serving.md."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qmove"  # the same picture for the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.5))
    for axis, quantile in zip(axes[0], ("p50", "p99"), strict=False):
        for policy, points in results["by_load"].items():
            axis.plot(results["loads"], [p[quantile] for p in points], marker="o", label=policy)
        axis.set(xlabel="requests a second", ylabel="seconds", yscale="log", title=quantile)
    axes[0][0].legend()
    axes[1][2].set_visible(False)
    places = [axes[0][2], axes[1][0], axes[1][1], axes[1][2]]
    for axis, (title, points) in zip(places, results["gains"].items(), strict=True):
        axis.set_visible(True)
        values = [point["value"] for point in points]
        axis.plot(values, [100 * p["gpu_seconds_saved"] for p in points], marker="o", color="C2")
        scale = "log" if values[0] > 0 and values[-1] / values[0] > 20 else "linear"
        axis.set(xlabel=title, ylabel="GPU time saved by parking, %", xscale=scale)
        axis.axhline(0, color="grey", linewidth=0.8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fiftieth of it, written nowhere")
    quick = parser.parse_args().quick
    setting = Setting()
    if quick:
        setting = replace(setting, replicas=40, models=400, requests=4000, requests_per_second=4.0)
    results = measure(setting)
    print(json.dumps(results["gpus"], indent=1))
    if not quick:
        (DOCS / "results" / "routing.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(results, DOCS / "routing.svg")


if __name__ == "__main__":
    main()

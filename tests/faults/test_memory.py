"""Memory over many cycles: RAM, VRAM, descriptors, maps and qmove's own books are flat, and RAM goes
back to the system."""

from __future__ import annotations

import json
import sys

import pytest

from tests.faults.builders import runs
from tests.faults.builders.processes import run

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.skipif(sys.platform != "linux", reason="counts what /proc shows"),
]

# Of each kind. The simulated device keeps what was freed for a while, to see whether anybody reads it:
# RAM is flat after about 800 cycles.
WARM, CYCLES = (1000, 1000) if runs.MINUTES else (10, 60)
KINDS = {
    "park and restore": "qmove.park(m); qmove.restore(m)",
    "park and wake": "qmove.park(m); m(inputs())",
    "park and stream": "qmove.park(m); qmove.restore(m, stream=True); m(inputs())",
    "park and drop": "m = layers(3); qmove.park(m); del m; m = kept",
    "home and drop": "m = layers(3); qmove.park(m); qmove.restore(m); del m; m = kept",
    "move": "qmove.move(m, 'cpu'); qmove.move(m, 'cuda:0')",
    "swap": "qmove.park(m); qmove.swap(other, m); qmove.swap(m, other); qmove.restore(m)",
    "no mirrors": (
        "qmove.configure(keep_mirrors=False); qmove.park(m); qmove.restore(m); "
        "qmove.configure(keep_mirrors=True)"
    ),
    "trim": "qmove.park(m); qmove.restore(m); qmove.trim()",
    "a refusal": """
        qmove.configure(ram_limit=1)
        try:
            qmove.park(m)
        except qmove.NotEnoughMemory:
            qmove.configure(ram_limit=None)
        else:
            raise AssertionError("parked in 1 byte")""",
    "a failure": """
        try:
            qmove.park(m, progress=fail)
        except ZeroDivisionError:
            pass
        else:
            raise AssertionError("the callback was not called")""",
}

BODY = """
    import gc, json, os, sys, textwrap, threading
    import psutil
    import simcuda
    from qmove_core import homes
    from qmove_core.memory import arena, blocks, giving_back, mirrors
    from qmove_core.parking import streaming

    def fail(*args):
        raise ZeroDivisionError

    # Whenever that thread looks, it has files of /proc open.
    giving_back.watch.end()
    kept = m = layers(3)
    other = layers(3)
    m(inputs())
    expected = m(inputs()).cpu()

    def settle():
        streaming.wait_for()
        gc.collect()
        qmove.trim()
        gc.collect()

    def counts():
        settle()
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "VRAM": torch.cuda.memory_allocated(0),
            "page-locked": simcuda.host_counters().registered,
            "arena": arena.bytes_held(),
            "mirrors": mirrors.nbytes(),
            "homes": len(homes._origins),
            "places": len(blocks._places),
        }

    def grown():
        return {
            "maps": sum(1 for _ in open("/proc/self/maps")),
            "RAM": psutil.Process().memory_info().rss,
            "objects": len(gc.get_objects()),
        }

    figures, (warm, cycles) = {}, map(int, sys.argv[1:3])
    for name, cycle in json.loads(sys.argv[3]).items():
        code = compile(textwrap.dedent(cycle), name, "exec")
        for _ in range(warm):
            exec(code)
        before, at_first = counts(), grown()
        for _ in range(cycles):
            exec(code)
        after, at_last = counts(), grown()
        assert torch.equal(kept(inputs()).cpu(), expected), name
        more = {name: at_last[name] - at_first[name] for name in at_last}
        figures[name] = [before, after, more]
    print(json.dumps(figures))
"""


def test_many_cycles_leave_nothing_behind() -> None:
    ended = run(BODY, str(WARM), str(CYCLES), json.dumps(KINDS))
    assert ended.returncode == 0, ended.stderr[-3000:]
    for kind, (before, after, more) in json.loads(ended.stdout).items():
        assert after == before, kind
        # A cycle that keeps an object or a map each time would show, or a third of a model.
        assert more["objects"] < CYCLES / 2, kind
        assert more["maps"] < CYCLES / 10, kind
        if runs.MINUTES:
            assert more["RAM"] < CYCLES * 16384, (kind, more)  # a third of the model
        runs.note("memory", cycles=CYCLES)


def test_ram_goes_back_to_the_system() -> None:
    """That of dropped models at once, that of spares and mirrors when asked."""
    ended = run("""
        import gc
        import psutil
        rss = lambda: psutil.Process().memory_info().rss
        models = [layers(4, width=1024) for _ in range(4)]  # 64 MiB
        total = sum(qmove.inventory(m).nbytes for m in models)
        for index, m in enumerate(models):
            for p in m.parameters():
                p.data.add_(index)  # equal ones would share their RAM
            qmove.park(m)
        parked = rss()
        del m, models, p
        gc.collect()
        qmove.trim()  # the simulated card's host memory is locked, and stays for the next park
        assert not qmove.stats().spare_bytes and not qmove.stats().parked_bytes
        assert rss() < parked - total * 9 // 10, (parked, rss(), total)

        m = layers(4, width=1024)
        qmove.park(m); qmove.restore(m)
        mirrored = rss()
        assert qmove.trim() >= total // 4
        assert qmove.stats().mirror_bytes == qmove.stats().spare_bytes == 0
        assert rss() < mirrored - total // 4 * 9 // 10, (mirrored, rss(), total)
    """)
    assert ended.returncode == 0, ended.stderr[-3000:]

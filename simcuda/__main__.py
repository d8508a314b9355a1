"""``python -m simcuda [--memory 4GiB] [--devices 2] (-m module | script.py) arguments...``"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from contextlib import nullcontext

from simcuda import SimulationError, activate, hostile, parse_size
from simcuda.counters import ALLOCATORS


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simcuda", description="Run a Python program with simulated CUDA devices."
    )
    parser.add_argument(
        "--memory", type=_size, default="4GiB", metavar="SIZE", help="capacity of each device"
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="how many devices, 1 to 16"
    )
    parser.add_argument(
        "--hostile",
        choices=ALLOCATORS[1:],
        metavar="ALLOCATOR",
        help=f"everything unkind at once (simcuda.hostile): {', '.join(ALLOCATORS[1:])}",
    )
    parser.add_argument(
        "-m", dest="module", metavar="MODULE", help="run a module, as with python -m"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="script.py arguments...")
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our options up to the program, and the program with its own arguments, which are not ours to
    read."""
    i = 0
    while i < len(arguments):
        word = arguments[i]
        if word == "-m":
            return arguments[: i + 2], arguments[i + 2 :]
        if not word.startswith("-"):
            return arguments[:i], arguments[i:]
        i += 2 if word in ("--memory", "--devices", "--hostile") else 1
    return arguments, []


def main(arguments: list[str]) -> None:
    """Activates the simulation and runs the program in this process, as ``python`` itself would."""
    parser = _parser()
    ours, program = _split(arguments)
    options = parser.parse_args(ours)
    if options.module is None and not program:
        parser.error("nothing to run: give a script, or -m and a module")
    if options.module is None and not os.path.isfile(program[0]):
        parser.error(f"no such script: {program[0]}")
    try:
        activate(devices=options.devices, memory=options.memory)
    except (SimulationError, ValueError) as error:
        parser.error(str(error))
    with hostile(options.hostile) if options.hostile else nullcontext():
        if options.module is not None:
            sys.argv = [options.module, *program]
            if sys.path[0] != os.getcwd():
                sys.path.insert(0, os.getcwd())
            runpy.run_module(options.module, run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            sys.path[0] = os.path.dirname(os.path.abspath(program[0]))
            runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

"""`qmove` on the command line: doctor, inspect, demo."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import QMoveError, readable_bytes

app = typer.Typer(
    help="Parks big quantized models out of VRAM into CPU RAM, and brings them back bit for bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print plain data for programs.")]


def main() -> None:
    """The `qmove` command."""
    app()


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from .doctor import installed_version

        # A checkout, or a folder in ComfyUI's custom_nodes, is not installed.
        said = installed_version("qmove") or "(not installed as a package)"
        console.print(f"qmove {said}", highlight=False)
        raise typer.Exit


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show devices, versions, memory and its limits, and what they mean."""
    from .doctor import examine

    report = examine()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    host = report.host
    rows = {"system": host.system + (" (WSL)" if host.wsl else ""), "python": host.python}
    for device in report.devices:
        free = f"{_bytes(device.free)} free of {_bytes(device.total)}"
        rows[device.name] = f"{device.model}: {free}"
    if not report.devices:
        rows["devices"] = "no accelerator"
    rows |= {
        "RAM": f"{_bytes(host.ram_available)} available of {_bytes(host.ram_total)}",
        "for parked models": f"{_bytes(host.usable)}, limited by: {host.usable_limit}",
        "free in the cgroup": _bytes(host.cgroup_free, "no limit"),
        "memlock limit": _bytes(host.memlock, "none"),
        **{name: version or "not installed" for name, version in report.versions.items()},
    }
    rows["torch"] += f" ({report.torch_build})"
    table = Table(title="qmove doctor", title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(value))
    console.print(table)
    for finding in report.findings:
        console.print(f"- {finding}", markup=False, highlight=False)


@app.command()
def inspect(
    saved: Annotated[
        str,
        typer.Argument(metavar="PATH_OR_PACKAGE", help="A file, a folder or an installed package."),
    ],
    as_json: AsJson = False,
) -> None:
    """List what a saved model holds, from its headers: nothing is loaded."""
    from .doctor import examine
    from .inspect_saved import inspect_saved

    try:
        model = inspect_saved(saved)
    except QMoveError as error:
        raise _failed(error) from error
    if as_json:
        typer.echo(json.dumps(model.to_dict(), indent=2))
        return
    title = f"{_bytes(model.nbytes)} in {len(model.tensors)} tensors: {model.source}"
    table = Table("file", "kind", "dtype", title=_text(title), title_justify="left")
    table.add_column("tensors", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("largest", overflow="ellipsis", no_wrap=True)
    for group, members in model.groups().items():
        largest = max(members, key=lambda tensor: tensor.nbytes)
        nbytes = sum(tensor.nbytes for tensor in members)
        table.add_row(*map(_text, (*group, str(len(members)), _bytes(nbytes), largest.name[:1000])))
    console.print(table)
    for component, quantization in (model.quantization or {"": "none"}).items():
        of = f" of {component}" if component else ""
        console.print(_text(f"quantization{of}: {quantization}"))
    for note in model.notes:
        console.print(_text(f"note: {note}"))
    host = examine().host
    fits = "fits" if model.nbytes <= host.usable else "does not fit"
    console.print(
        f"Parked as saved it {fits} in the {_bytes(host.usable)} of RAM that qmove may use "
        f"({host.usable_limit})."
    )


@app.command()
def demo(
    picture: Annotated[
        Path, typer.Option(help="Where the picture goes, VRAM and RAM over time.")
    ] = Path("qmove-demo.png"),
) -> None:
    """Park and restore a real quantized model, beside what plain .to() leaves and does."""
    if find_spec("qmove_core.cli.demo") is None:  # as in ComfyUI's registry (.comfyignore)
        raise _failed(
            QMoveError(
                "The demo is not in this copy of qmove: run `make demo` in a checkout of its "
                "repository."
            )
        )
    from .demo import run

    try:
        raise typer.Exit(run.main(console, picture))
    except QMoveError as error:
        raise _failed(error) from error


def _failed(error: QMoveError) -> typer.Exit:
    Console(stderr=True).print(_text(f"qmove: {error}", "red"), highlight=False, soft_wrap=True)
    return typer.Exit(1)


def _text(content: str, style: str = "") -> Text:
    """Text that comes from a file or from the user: no markup, and nothing the terminal obeys.

    Line breaks stay only in an error, which has several lines.
    """
    kept = "".join(
        c if c.isprintable() or (c == "\n" and style) else f"\\x{ord(c):02x}" for c in content
    )
    return Text(kept, style)


def _bytes(nbytes: int | None, without: str = "unknown") -> str:
    return without if nbytes is None else readable_bytes(nbytes)

"""The documentation: every public name is in the reference, with its arguments and units."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import qmove_core as qmove
from qmove_core import QMoveError

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "\n".join(
    page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md"))
)
FUNCTIONS = [name for name in qmove.__all__ if inspect.isroutine(getattr(qmove, name))]
ERRORS = [
    name
    for name in qmove.__all__
    if inspect.isclass(getattr(qmove, name)) and issubclass(getattr(qmove, name), QMoveError)
]


def test_the_reference_has_every_public_name_once() -> None:
    assert sorted(re.findall(r"^::: qmove_core\.(\w+)$", REFERENCE, re.M)) == sorted(qmove.__all__)


def section(docstring: str, name: str) -> str:
    """The indented lines below a heading of a docstring."""
    found = re.search(rf"^{name}:\n((?:(?:    .*)?\n?)+)", docstring, re.M)
    return found.group(1) if found else ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_argument_of_a_public_function_is_described(name: str) -> None:
    function = getattr(qmove, name)
    documented = re.findall(
        r"^    \*{0,2}(\w+): ", section(inspect.getdoc(function) or "", "Args"), re.M
    )

    parameters = inspect.signature(function).parameters.values()
    wanted = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    assert documented == wanted


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_errors_that_a_public_function_names_are_public(name: str) -> None:
    raised = re.findall(
        r"^    (\w+(?:, \w+)*): ",
        section(inspect.getdoc(getattr(qmove, name)) or "", "Raises"),
        re.M,
    )

    for error in ", ".join(raised).split(", ") if raised else ():
        assert error in qmove.__all__ or error in ("ValueError", "OSError"), error


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_says_when_it_is_raised(name: str) -> None:
    assert len((inspect.getdoc(getattr(qmove, name)) or "").split()) >= 5


@pytest.fixture(scope="module")
def site():  # type: ignore[no-untyped-def]
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    from tools import docs_site

    return docs_site


def test_links_between_pages_lead_to_pages_of_the_site(site) -> None:  # type: ignore[no-untyped-def]
    class Page:
        class file:
            src_uri = "architecture.md"

    markdown = (
        "[room](../qmove_core/parking/README.md) ![p](architecture.svg) [code](../qmove_core/park.py) "
        "[out](https://pytorch.org) [up](#words) [readme](../README.md#install)"
    )

    assert site.on_page_markdown(markdown, Page, None, None) == (
        "[room](rooms/qmove_core/parking.md) ![p](architecture.svg) code "
        "[out](https://pytorch.org) [up](#words) [readme](index.md#install)"
    )


def test_each_page_of_the_navigation_is_there(site) -> None:  # type: ignore[no-untyped-def]
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]

    assert set(re.findall(r": ([\w/-]+\.md)$", text, re.M)) <= {*site.pages().values(), "nodes.md"}

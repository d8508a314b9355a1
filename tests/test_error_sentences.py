"""Every error is a sentence: classes are rendered with every action, messages read where raised."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest

import qmove_core
from qmove_core.actions import FORMS, Action, Verb
from qmove_core.errors import (
    CannotAttach,
    CannotMove,
    CannotWriteToDisk,
    CapturingGraph,
    ChangesNotKept,
    CorruptedCopy,
    DeviceLost,
    InUse,
    LiveAutogradGraph,
    MetaTensorsPresent,
    NotEnoughDeviceMemory,
    NotEnoughMemory,
    OffloadedDataError,
    Pinned,
    QMoveError,
    counted,
    first_of,
)
from qmove_core.materialize.reading import FileCutShort
from qmove_core.memory.mapped_files import MappedFileChanged

VERBS = get_args(Verb)
REASONS = [("lm_head.weight", "it is sparse")]
ADVICE = "Park another model first."


class LlamaForCausalLM:
    """A class whose name no message may change."""


# What raises each class takes an action and writes the sentence itself.
WITH_AN_ACTION: dict[type[QMoveError], Callable[[Action], QMoveError]] = {
    NotEnoughMemory: lambda action: NotEnoughMemory(
        action, "cuda:0", 3 << 30, 1, "free VRAM", ADVICE
    ),
    NotEnoughDeviceMemory: lambda action: NotEnoughDeviceMemory(
        action, "cuda:0", 3 << 30, 1, "free VRAM", ADVICE
    ),
    CorruptedCopy: lambda action: CorruptedCopy(action, ["lm_head.weight"]),
    CannotMove: lambda action: CannotMove(action, REASONS),
    CapturingGraph: CapturingGraph,
    DeviceLost: lambda action: DeviceLost(action, "cuda:0", RuntimeError("CUDA error: x.\ny")),
    MetaTensorsPresent: lambda action: MetaTensorsPresent(
        action, "a dispatch keeps the data of 1 tensor elsewhere, the first is 'x'", ADVICE
    ),
    OffloadedDataError: lambda action: OffloadedDataError(action, REASONS, ADVICE),
    ChangesNotKept: lambda action: ChangesNotKept(action, REASONS),
    InUse: lambda action: InUse(action, "MainThread", "keeps it home (qmove.resident)"),
    CannotWriteToDisk: lambda action: CannotWriteToDisk(
        action, Path("weights.safetensors"), "no space left", "Free room on that disk."
    ),
    CannotAttach: lambda action: CannotAttach(
        action, Path("weights.safetensors"), "it has other weights", [("lm_head.weight", "no")]
    ),
    Pinned: lambda action: Pinned(action, "LlamaForCausalLM"),
    LiveAutogradGraph: lambda action: LiveAutogradGraph(action, ["lm_head.weight"]),
}


def all_error_classes() -> set[type[QMoveError]]:
    for module in pkgutil.walk_packages(qmove_core.__path__, "qmove_core."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, new = set(), [QMoveError]
    while new:
        found.update(new)
        new = [sub for cls in new for sub in cls.__subclasses__() if sub not in found]
    return {cls for cls in found if cls.__module__.startswith("qmove_core.")}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("cls", WITH_AN_ACTION, ids=lambda cls: cls.__name__)
def test_every_error_reads_well_with_every_action(cls: type[QMoveError], verb: Verb) -> None:
    message = str(WITH_AN_ACTION[cls](Action(verb, LlamaForCausalLM(), "on cuda:0")))

    gerund, _done = FORMS[verb]
    opening = message.splitlines()[0]
    assert re.match(
        rf"Cannot {verb} LlamaForCausalLM on cuda:0(: (a|this )|, so (nothing was|the model stays))"
        rf"|{gerund} LlamaForCausalLM on cuda:0 (needs 3\.00 GiB|failed: the digest)",
        opening,
    ), message
    read(message)
    assert re.search(r"[.)]$|^  \S+: .+$", message.splitlines()[-1]), message
    if cls is not ChangesNotKept and cls is not CorruptedCopy:
        assert re.search(r"[Nn]othing was (moved|changed)[.:]", message)


def read(message: str) -> None:
    """What holds for every message, whatever it says."""
    assert re.match(r"[A-Z]", message), message
    assert not re.search(r"Cannot \w+ing\b", message), message
    assert not re.search(r"\b1 \w+s\b(?<!\b1 is)", message), message
    assert not re.search(r"\.\.(?!\.)(?<!\.\.\.)| ,| \.(?=\s)|  (?=\S)(?<!\n  )", message), message


def test_forms_are_given_for_each_verb_and_are_what_english_makes_of_it() -> None:
    assert list(FORMS) == list(VERBS)
    for verb, (gerund, done) in FORMS.items():
        assert gerund.lower() == verb.removesuffix("e") + "ing"
        assert done in ("moved", "changed")


def test_an_action_keeps_class_names_as_they_are_and_no_model_alive() -> None:
    action = Action("dequantize", LlamaForCausalLM(), "to cpu")

    assert action.infinitive == "dequantize LlamaForCausalLM to cpu"
    assert action.gerund == "Dequantizing LlamaForCausalLM to cpu"
    assert all(type(value) is str for value in vars(action).values())
    assert Action("park", LlamaForCausalLM()).infinitive == "park LlamaForCausalLM"


def test_numbers_and_lists_of_names_agree_with_their_nouns() -> None:
    assert [counted(count, "tensor") for count in (0, 1, 2)] == [
        "0 tensors",
        "1 tensor",
        "2 tensors",
    ]
    assert first_of(["a", "b"]) == "a, b"
    assert first_of(list("abcdefg")) == "a, b, c, d, e and 2 more"


# The other classes have the sentence that they are raised with.

OTHER_CLASSES = {
    *("QMoveError", "UnknownDevice", "NoTensors", "DtypeCastRefused"),
    *("MissingDependency", "CannotMirror", "CannotInspect", "NoAccelerator", "NotSafetensors"),
}


def test_every_error_class_is_read_here() -> None:
    known = {cls.__name__ for cls in (*WITH_AN_ACTION, MappedFileChanged, FileCutShort)}
    known |= OTHER_CLASSES
    assert {cls.__name__ for cls in all_error_classes()} == known


def test_a_changed_file_is_named_with_what_may_be_lost() -> None:
    read(str(MappedFileChanged(Path("model.safetensors"), ["a", "b"], "it is shorter now")))


def test_a_file_that_is_cut_short_is_named_with_what_to_do() -> None:
    read(str(FileCutShort(Path("model.safetensors"))))


def messages_at_their_raise() -> Iterator[tuple[str, str]]:
    """(place, message) of every error of OTHER_CLASSES; what is put in there stands as "X"."""
    (folder,) = map(Path, qmove_core.__path__)
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in OTHER_CLASSES
            ):
                (message,) = node.args
                yield f"{file.relative_to(folder)}:{node.lineno}", rendered(message)


def rendered(message: ast.expr) -> str:
    if isinstance(message, ast.Constant):
        return str(message.value)
    assert isinstance(message, ast.JoinedStr), ast.unparse(message)
    return "".join(part.value if isinstance(part, ast.Constant) else "X" for part in message.values)


@pytest.mark.parametrize(
    ("place", "message"), list(messages_at_their_raise()), ids=lambda x: x[:30]
)
def test_every_other_message_is_a_sentence_where_it_is_raised(place: str, message: str) -> None:
    read(message)
    assert re.search(r"[.X]$|pip install \S+$", message)  # X: advice that another place writes


def test_there_are_such_messages() -> None:
    assert len(list(messages_at_their_raise())) > 20

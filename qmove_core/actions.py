"""What a caller asked for, in the grammatical forms that messages need."""

from __future__ import annotations

from typing import Literal

Verb = Literal[
    "park",
    "restore",
    "move",
    "materialize",
    "dispatch",
    "dequantize",
    "requantize",
    "rebuild",
    "attach",
    "stream",
]

# For each verb: its gerund, and what did not happen to the model if the action is refused.
FORMS: dict[Verb, tuple[str, str]] = {
    "park": ("Parking", "moved"),
    "restore": ("Restoring", "moved"),
    "move": ("Moving", "moved"),
    "materialize": ("Materializing", "changed"),
    "dispatch": ("Dispatching", "changed"),
    "dequantize": ("Dequantizing", "changed"),
    "requantize": ("Requantizing", "changed"),
    "rebuild": ("Rebuilding", "changed"),
    "attach": ("Attaching", "changed"),
    "stream": ("Streaming", "moved"),
}


class Action:
    """One request, for error messages and log lines. It is text only and keeps no model alive.

    Attributes:
        infinitive: "move LlamaForCausalLM to cuda:0", to follow "Cannot ".
        gerund: "Moving LlamaForCausalLM to cuda:0", the subject of a sentence.
        nothing_done: "nothing was moved", for a request that was refused.
    """

    def __init__(self, verb: Verb, model: object, rest: str = "") -> None:
        """`rest` follows the name of the model's class: "to cuda:0", "again"."""
        gerund, done = FORMS[verb]
        what = f"{type(model).__name__} {rest}".rstrip()
        self.infinitive = f"{verb} {what}"
        self.gerund = f"{gerund} {what}"
        self.nothing_done = f"nothing was {done}"

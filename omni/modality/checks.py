"""Checks of a bundle's fields, when it is created."""

import re
from typing import Any


def expect_valid(bundle: Any) -> None:
    """Check the fields of a `Modality`.

    Raises:
        ValueError: a name, placeholder, output or suffix cannot be used, or there are no inputs.
    """
    name, token = bundle.name, bundle.token
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ValueError(f"A modality's name is a lower-case identifier such as 'image', found {name!r}.")
    if name in ("text", "language", "lm"):
        raise ValueError(f"The name {name!r} belongs to the language model; choose another.")
    if not token or token != token.strip():
        raise ValueError(f"The placeholder of {name!r} must be text without spaces around, found {token!r}.")
    if not bundle.inputs:
        raise ValueError(f"The modality {name!r} names no inputs; its encoder must read at least one.")
    if not set(bundle.outputs) <= {"cls", "grid", "cls+grid"} or not bundle.outputs:
        raise ValueError(f"The outputs of {name!r} are some of cls, grid, cls+grid; found {bundle.outputs}.")
    if wrong := [each for each in bundle.suffixes if not re.fullmatch(r"\.[a-z0-9]+", each)]:
        raise ValueError(f"The suffixes of {name!r} look like '.wav', in small letters; found {wrong}.")

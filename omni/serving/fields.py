"""What all requests have in common: kinds of fields with their bounds, and how a body is read.

Unknown fields are refused by name. Fields that do not affect the answer (`harmless`) are dropped. A field for something that
this server cannot do is accepted only with a value that asks for nothing. So nothing is ignored silently, and no client can
make the server use too much memory or time.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

MAX_VALUES = 200_000
"""The largest number of values in all lists and objects of a request. Two bytes of JSON can take sixty bytes of memory."""


class RequestError(ValueError):
    """A request cannot be answered. The message is one sentence."""

    status = 400


# --- Kinds of fields --------------------------------------------------------------------------------------------------


def only(*neutral: Any) -> BeforeValidator:
    """A field for something that this server cannot do. Only these values are accepted."""

    def check(value: Any) -> Any:
        if not any(value == each and type(value) is type(each) for each in neutral):
            expected = " or ".join(json.dumps(each) for each in neutral)
            raise PydanticCustomError("only", "this server can follow {expected} alone", {"expected": expected})
        return value

    return BeforeValidator(check)


def wrapped(wrap: Callable[[str], Any], expected: str) -> BeforeValidator:
    """A field that may be text, which stands for a longer form."""

    def check(value: Any) -> Any:
        if not isinstance(value, str | list | dict):
            raise PydanticCustomError("wrapped", "expected {expected}", {"expected": expected})
        return wrap(value) if isinstance(value, str) else value

    return BeforeValidator(check)


def few(limit: int, values: Any) -> Any:
    """Refuse an object with too many entries, with one error instead of one for each entry."""
    if isinstance(values, dict) and len(values) > limit:
        raise PydanticCustomError(
            "few", "expected at most {limit} entries, found {found}", {"limit": limit, "found": len(values)}
        )
    return values


Count = Annotated[int, Field(ge=1, le=2**31)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=100)]],
    Field(max_length=16, fail_fast=True),
    wrapped(lambda text: [text], "text or a list of texts"),
]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(partial(few, 1000)),
]
Variables = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z]\w*$", max_length=100)],
        bool | int | float | Annotated[str, Field(max_length=1000)],
    ],
    BeforeValidator(partial(few, 16)),
]


class Checked(BaseModel):
    """An object in a request. Unknown fields and other types are refused; null counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)
    harmless: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, values: Any) -> Any:
        if not isinstance(few(100, values), dict):
            return values
        return {key: value for key, value in values.items() if value is not None and key not in cls.harmless}


# --- From bytes -------------------------------------------------------------------------------------------------------

Kind = TypeVar("Kind", bound=Checked)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Parse and check the body of a request.

    Raises:
        RequestError: a field is not as expected; the message names it.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise RequestError(f"Expected a request of at most {MAX_VALUES:,} lists, objects and commas; send fewer.")
    try:
        return kind.model_validate(from_json(body, allow_inf_nan=False))
    except ValidationError as error:
        raise RequestError(_sentence(error)) from None
    except ValueError as error:
        escape = "; write both halves of a character beyond \\uFFFF" if "escape" in str(error) else ""
        raise RequestError(f"Expected a JSON object as the body of the request ({error}){escape}.") from None


def _sentence(error: ValidationError) -> str:
    """A sentence about the first error and its place."""
    found = error.errors(include_url=False, include_context=False)[0]
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in found["loc"]]
    where = "".join(steps).removeprefix(".")
    if found["type"] == "missing":
        return f"Expected {where!r}, found nothing."
    if found["type"] == "extra_forbidden":
        return f"This server does not know {where!r}; leave it out."
    message = "it should be an object" if found["type"] == "model_type" else found["msg"].replace("Input", "it", 1)
    shown = "" if isinstance(found["input"], dict) else f", found {str(found['input'])[:60]!r}"
    return f"In {repr(where) if where else 'the body of the request'}: {message[0].lower()}{message[1:]}{shown}."

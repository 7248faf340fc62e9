"""A check, its finding, and the order in which checks run."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Literal

from pydantic import BaseModel, ConfigDict

from omni.contract.subject import Subject

Result = Literal["passed", "failed", "not offered", "not run"]


class BrokenError(Exception):
    """The plug-in breaks a promise. The message is one sentence that says what to fix."""


class NotOfferedError(Exception):
    """The plug-in leaves out an optional field. The message says which, and what it is for."""


class NotRunError(Exception):
    """A check cannot run here. The message says why, and what it needs."""


@dataclass(frozen=True)
class Check:
    """One promise of a plug-in.

    Attributes:
        name: a word or two.
        promise: what holds if the check passes; one sentence.
        run: raises an error if it does not hold.
        needs: names of checks that must pass first.
    """

    name: str
    promise: str
    run: Callable[[Subject], None]
    needs: tuple[str, ...] = ()


class Finding(BaseModel):
    """The result of a check.

    Attributes:
        check: its name.
        result: "not offered" if the plug-in leaves out an optional field, "not run" if the check could not run.
        sentence: the promise that holds, or what to fix, add or do.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    result: Result
    sentence: str


def examine(
    subject: Subject, checks: Sequence[Check], progress: Callable[[str], None] = lambda name: None
) -> Iterator[Finding]:
    """Run checks in order. A check whose `needs` did not pass is not run.

    Args:
        subject: the plug-in under examination.
        checks: the checks, such as `omni.contract.suite.CHECKS`.
        progress: called with the name of each check before it is run.
    """
    results: dict[str, Result] = {}
    for check in checks:
        progress(check.name)
        if missing := [name for name in check.needs if results.get(name, "passed") != "passed"]:
            result: Result = "not offered" if results[missing[0]] == "not offered" else "not run"
            finding = Finding(check=check.name, result=result, sentence=f"It comes after {missing[0]!r}.")
        else:
            finding = _try(check, subject)
        results[check.name] = finding.result
        yield finding


def _try(check: Check, subject: Subject) -> Finding:
    result: Result = "passed"
    sentence = check.promise
    try:
        check.run(subject)
    except NotOfferedError as error:
        result, sentence = "not offered", str(error)
    except NotRunError as error:
        result, sentence = "not run", str(error)
    except BrokenError as error:
        result, sentence = "failed", str(error)
    except Exception as error:  # a plug-in may raise anything
        result, sentence = "failed", _told(check, subject, error)
    return Finding(check=check.name, result=result, sentence=sentence)


def _told(check: Check, subject: Subject, error: Exception) -> str:
    """A sentence about an unexpected error, with the last line of the plug-in in its traceback."""
    said = shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...").rstrip(".")
    own = [
        f"{Path(frame.f_code.co_filename).name}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if subject.owns(frame.f_globals.get("__name__", ""))
    ]
    where = f" in {own[-1]}" if own else ""
    return (
        f"Expected that {check.promise[0].lower()}{check.promise[1:].removesuffix('.')}; found {said}{where}; fix that."
    )

"""The problems of a data set: their kinds, and a report of them as a table and as lines."""

from collections import Counter
from typing import get_args

from pydantic import BaseModel, ConfigDict, computed_field
from rich.table import Table

from omni.data.names import Names
from omni.data.sources import RowProblem
from omni.modality import ItemProblem
from omni.registry import get_modality

NOTES = ("text alone", "no words", "unused")
"""Problems that are reported but may be intended: chats without an item, questions without a word, and files that no row
names."""


def kinds() -> tuple[str, ...]:
    """The kinds of problems, in the order in which they are listed."""
    duplicates = (duplicate_of(name) for name in dict.fromkeys(Names.known().tokens.values()))
    of_sets = ("too long", "control token", "duplicate row", *duplicates, "leak")
    return (*get_args(RowProblem), *get_args(ItemProblem), *of_sets, *NOTES)


def duplicate_of(modality: str) -> str:
    """The kind of problem of two files with the same item, such as "duplicate picture"."""
    return f"duplicate {get_modality(modality).noun}"


class Problem(BaseModel):
    """One problem of a data set.

    Attributes:
        kind: one of `kinds()`.
        part: the name of the data set, such as "train".
        source: the row, by file and line or entry. For "unused", and where most rows have the same note, the data set.
        file: the file of an item, if the problem is about one.
        sentence: what is wrong and what to do, without the source.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    part: str
    source: str
    file: str | None
    sentence: str


class Report(BaseModel):
    """The problems of some data sets. A file is reported once, with the first row that names it.

    Attributes:
        rows: number of rows that were read.
        parts: by name of the data set, the number of its rows that were read.
        whole: whether these are all of its rows, and not a sample.
        items: number of files by modality.
        pictures: number of picture files, as in `items`.
        problems: the problems, in the order of the rows.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    parts: dict[str, int]
    whole: bool
    items: dict[str, int]
    problems: list[Problem]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def pictures(self) -> int:
        """Number of picture files."""
        return self.items.get("image", 0)

    @property
    def counted(self) -> str:
        """The rows and the files in words."""
        files = [f"{count:,} {get_modality(name).noun}s" for name, count in self.items.items()]
        parts = " and ".join(f"{count:,} of {name}" for name, count in self.parts.items())
        rows = f"{'' if self.whole else 'a sample of '}{self.rows:,} rows"
        return ", ".join([f"{rows} ({parts})" if len(self.parts) > 1 else rows, *(files or ["no items"])])

    @property
    def clean(self) -> bool:
        """Whether there are no problems but notes."""
        return all(problem.kind in NOTES for problem in self.problems)


def render(report: Report) -> Table:
    """The number of problems of each kind, as a table for the terminal."""
    table = Table(title=report.counted, min_width=40)
    table.add_column("problem")
    several = len(report.parts) > 1
    for name in report.parts:
        table.add_column(name if several else "found", justify="right")
    counts = Counter((problem.kind, problem.part) for problem in report.problems)
    for kind in kinds():
        found = [counts[kind, name] for name in report.parts]
        if any(found):
            table.add_row(f"{kind} (a note)" if kind in NOTES else kind, *(f"{count:,}" for count in found))
    return table


def first_of_each(report: Report, most: int = 3) -> list[str]:
    """Lines about the first problems of each kind and data set, and the number of further ones."""
    lines = []
    for kind in kinds():
        for part in report.parts:
            found = [problem for problem in report.problems if (problem.kind, problem.part) == (kind, part)]
            named = f"{kind} of {part}" if len(report.parts) > 1 else kind
            lines += [f"{named}: {problem.source}: {problem.sentence}" for problem in found[:most]]
            lines += [f"{named}: and {len(found) - most:,} more; --json lists them"] if len(found) > most else []
    return lines

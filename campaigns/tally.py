"""What came of a campaign."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tally:
    """How many inputs were tried, and what became of them.

    Attributes:
        tried: inputs.
        refused: those that were refused with an error of one sentence.
        unchanged: those that gave what the reference gives.
        fell_through: what went wrong without a word, or in too many: a line for each, with what repeats it.
    """

    tried: int
    refused: int
    unchanged: int
    fell_through: tuple[str, ...]

"""The result of a campaign."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tally:
    """The number of inputs by outcome.

    Attributes:
        tried: all inputs.
        refused: inputs that were refused with an error of one sentence.
        unchanged: inputs with the result of the reference.
        failures: a line for each input that is neither: what is wrong, and how to repeat it.
    """

    tried: int
    refused: int
    unchanged: int
    failures: tuple[str, ...]

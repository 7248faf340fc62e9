"""Evaluation that can be trusted: exact match by kind of question, with its uncertainty and with what guessing gets.

Questions are asked the way a user asks: one prompt, its pictures, greedy generation, and the answer compared to the last
character. Beside every accuracy stand the number of questions, the 95 % interval, and the score of the best constant
answer. The sight test asks the same questions with the picture blanked, exchanged or turned to noise: a model that uses
the picture falls to about what a constant answer gets. Encoders are measured without words, see `encoder`.

    outcome = evaluate("checkpoints/omni_tiny", choose_settings("checkpoints/omni_tiny", pictures=100, sight=True))
    rich.print(render(outcome.result))
    verify(outcome.result).differences                  # hashes and scores that are not as they were
"""

from .measuring import Outcome, Verification, choose_settings, evaluate, verify
from .result import EncoderSettings, Hashes, ManifestSettings, Result, write_answers
from .scores import Asked, EvaluationError, Score, SightTest
from .sheet import write_sheet
from .tables import read_card, render, update_card

__all__ = [
    "Asked",
    "EncoderSettings",
    "EvaluationError",
    "Hashes",
    "ManifestSettings",
    "Outcome",
    "Result",
    "Score",
    "SightTest",
    "Verification",
    "choose_settings",
    "evaluate",
    "read_card",
    "render",
    "update_card",
    "verify",
    "write_answers",
    "write_sheet",
]

"""Evaluation: exact match by kind of question, with its uncertainty and with the score of guessing.

Questions are asked as a user asks them: one prompt, its items, greedy generation. An answer is right if it equals the
expected one, character by character. Beside every accuracy stand the number of questions, the 95 % interval, and the score
of the best constant answer. The sight test asks the same questions with the pictures, or the sounds, blank, swapped or
turned to noise; a model that uses them then scores about as well as a constant answer. An encoder is measured without a
language model (`probing`), also on pictures of your own (`across`).

    outcome = evaluate("checkpoints/omni_tiny", choose_settings("checkpoints/omni_tiny", pictures=100, sight=True))
    rich.print(render(outcome.result))
    measure_again(outcome.result).differences           # hashes and scores that have changed
"""

from .measuring import Comparison, Outcome, choose_settings, evaluate, measure_again
from .result import Hashes, Result, write_answers
from .scores import Asked, EvaluationError, Score, SightTest
from .settings import EncoderSettings, ManifestSettings, PictureSettings
from .sheet import write_sheet
from .tables import read_card, render, update_card

__all__ = [
    "Asked",
    "Comparison",
    "EncoderSettings",
    "EvaluationError",
    "Hashes",
    "ManifestSettings",
    "Outcome",
    "PictureSettings",
    "Result",
    "Score",
    "SightTest",
    "choose_settings",
    "evaluate",
    "measure_again",
    "read_card",
    "render",
    "update_card",
    "write_answers",
    "write_sheet",
]

"""Evaluation that can be trusted: exact match by kind of question, with its uncertainty and with what guessing gets.

Questions are asked the way a user asks: one prompt, its pictures, greedy generation, and the answer compared to the last
character. Beside every accuracy stand the number of questions, the 95 % interval, and the score of the best constant
answer. The sight test asks the same questions with the picture blanked, exchanged or turned to noise: a model that uses
the picture falls to about what a constant answer gets. Encoders are measured without words, see `encoder`.

    outcome = evaluate("checkpoints/omni_tiny", SceneSettings(pictures=100, sight=True))
    rich.print(render(outcome.result))
    verify(outcome.result).differences                  # hashes and scores that are not as they were
"""

from omni.loading.encoder import Encoder, load_encoder
from omni.scenes.evaluation import SceneQuestions, evaluate_scenes

from .asking import Item, Query, Questionnaire, ask_all, generate_answers
from .encoder import evaluate_encoder
from .manifest import ManifestQuestions
from .result import EncoderSettings, Hashes, ManifestSettings, Result, SceneSettings, write_answers
from .run import Outcome, Verification, choose_settings, evaluate, kind_of, verify
from .scores import (
    SIGHTS,
    Asked,
    Evaluation,
    EvaluationError,
    Score,
    Sight,
    SightTest,
    score,
    sight_test,
    uses_the_picture,
    wilson_interval,
)
from .sheet import write_sheet
from .tables import model_card_section, read_card, render, update_card

__all__ = [
    "SIGHTS",
    "Asked",
    "Encoder",
    "EncoderSettings",
    "Evaluation",
    "EvaluationError",
    "Hashes",
    "Item",
    "ManifestQuestions",
    "ManifestSettings",
    "Outcome",
    "Query",
    "Questionnaire",
    "Result",
    "SceneQuestions",
    "SceneSettings",
    "Score",
    "Sight",
    "SightTest",
    "Verification",
    "ask_all",
    "choose_settings",
    "evaluate",
    "evaluate_encoder",
    "evaluate_scenes",
    "generate_answers",
    "kind_of",
    "load_encoder",
    "model_card_section",
    "read_card",
    "render",
    "score",
    "sight_test",
    "update_card",
    "uses_the_picture",
    "verify",
    "wilson_interval",
    "write_answers",
    "write_sheet",
]

"""Teach any causal language model to see or to hear: compose, write a recipe, train, evaluate, write a card.

    lesson = Lesson(language_model="SmolLM2-135M-Instruct", encoders={"image": "checkpoints/vision_tiny"}, minutes=30)
    teach(lesson, "mine")

`omni.exchange.compose` joins the parts, `omni.training.run` trains, and `omni.evaluation` measures. This room only connects
them: `budget` measures what a training step needs, `plan` writes the recipes, `watch` reports progress, and `course` calls
all of these.

    mine/config.json, model.safetensors, ...   the checkpoint: the trained parts, and the folders of the others
    mine/README.md, evaluation.json            its card and its scores
    mine/recipe.json                           the recipe, for `omni train`
    mine/lesson.json                           the lesson
    mine/start                                 the checkpoint that training starts from
    mine/stage-1, stage-1.json, ...            the result and the recipe of each stage but the last, if there are stages
    mine/language_model                        the weights of a .gguf file, if one was given
    mine/data                                  the two parts of the user's data, if no test set was given
    mine/run                                   checkpoints and curves of the run
"""

from .course import teach
from .lesson import Lesson

__all__ = ["Lesson", "teach"]

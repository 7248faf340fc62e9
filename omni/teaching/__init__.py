"""Teach any causal language model to see or to hear: compose, write a recipe, train, evaluate, write a card.

    lesson = Lesson(language_model="SmolLM2-135M-Instruct", encoders={"image": "checkpoints/vision_tiny"}, minutes=30)
    teach(lesson, "mine")

A thin room: `omni.exchange.compose` joins the parts, `omni.training.run` trains, `omni.evaluation` measures. What is here
decides what a recipe has to say (`plan`), by what the machine and the model need for a step (`budget`), and tells how it
goes (`watch`).

    mine/config.json, model.safetensors, ...   the checkpoint: what was learnt, and where the rest is
    mine/README.md, evaluation.json            its card and its scores
    mine/recipe.json                           what `omni train` can run again
    mine/lesson.json                           what was asked for
    mine/start                                 the checkpoint that training begins with
    mine/language_model                        where a .gguf file was given: its weights as a folder
    mine/data                                  where data of one's own were given without a test: both parts of them
    mine/run                                   checkpoints and curves of the run
"""

from .course import teach
from .lesson import Lesson

__all__ = ["Lesson", "teach"]

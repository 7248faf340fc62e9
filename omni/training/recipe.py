"""A recipe: one JSON file that says what is trained, from what, on what, how, and what to expect of it."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Unknown keys raise: a typo never becomes a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class About(Strict):
    """What a reader wants to know before spending hours."""

    makes: str
    hardware: str
    time: str
    expect: str


class Scenes(Strict):
    """Pictures drawn while training: `count` scenes of the split, from seed `first` on."""

    split: Literal["train", "test", "pairs"] = "train"
    count: int = Field(gt=0)
    first: int = Field(default=0, ge=0)
    min_objects: int = 1
    max_objects: int = 6
    neutral: float = Field(default=0.0, ge=0.0, le=1.0)
    questions: int = Field(default=8, gt=0)

    def scene_options(self) -> dict[str, Any]:
        """What `sample_scene` takes."""
        return {"min_objects": self.min_objects, "max_objects": self.max_objects, "neutral": self.neutral}


class Optimizer(Strict):
    """Muon on matrices and AdamW on the rest, or AdamW on all; learning rates by parameter-name pattern."""

    name: Literal["muon", "adamw"] = "muon"
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    lr_scale: dict[str, float] = {}


class Recipe(Strict):
    """Everything that `omni train` needs."""

    about: About
    objective: Literal["dense", "answers"]
    model: dict[str, Any]
    train: Scenes
    evaluate: Scenes
    optimizer: Optimizer
    arguments: dict[str, Any]
    output: str

    @classmethod
    def read(cls, path: str | Path, overrides: list[str] | None = None) -> "Recipe":
        """Read a recipe and apply `key.subkey=value` overrides (values are JSON, or else text).

        Raises:
            ValueError: an unknown key, a value of the wrong type, or an override that names no place.
        """
        recipe = json.loads(Path(path).read_text(encoding="utf-8"))
        for override in overrides or []:
            key, sign, text = override.partition("=")
            if not sign:
                raise ValueError(f"An override looks like key=value, found {override!r}.")
            *parents, last = key.split(".")
            place = recipe
            for parent in parents:
                if not isinstance(place.get(parent), dict):
                    raise ValueError(f"{key!r} names nothing in {path}: there is no section {parent!r}.")
                place = place[parent]
            try:
                place[last] = json.loads(text)
            except json.JSONDecodeError:
                place[last] = text
        return cls.model_validate(recipe)

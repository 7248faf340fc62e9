"""A recipe: one JSON file that names the objective, the model, the data and the settings of a training run."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from huggingface_hub.errors import StrictDataclassError
from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from safetensors import SafetensorError

from omni.files import read_json
from omni.training.arguments import check_arguments
from omni.training.sections import (
    SECTIONS,
    TALKS,
    About,
    ClassifierSection,
    ContrastiveSection,
    Data,
    Drawn,
    EncoderSection,
    Files,
    Lora,
    Mixture,
    OmniSection,
    Optimizer,
    Pattern,
    Strict,
    sources_of,
)
from omni.worlds import WorldError


class RecipeError(ValueError):
    """A recipe cannot be followed. The message is one sentence: what was expected, what was found, what to do."""


@contextmanager
def said_by_recipe(key: str, value: Any) -> Iterator[None]:
    """Inside, the recipe's value at `key` is used. An error there becomes a `RecipeError` that names key and value."""
    try:
        yield
    except (ValueError, OSError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise RecipeError(f"Correct `{key}` of the recipe, as {value!r} cannot be used: {error}") from error


def _problem(place: tuple[int | str, ...], message: str) -> str:
    where = [".".join(map(str, place))] if place else []
    return ": ".join([*where, message.removeprefix("Value error, ")])


_FOR_ANSWERS = ("neftune_noise_alpha", "activation_checkpointing", "gradient_checkpointing")
"""Arguments that need a language model."""


class Recipe(Strict):
    """Everything that `omni train` needs.

    Attributes:
        about: for the reader.
        objective: what the model learns, see `omni.training.objectives`.
        model: the section of this objective, see `SECTIONS`.
        train, evaluate: the data.
        optimizer: the optimizer and its learning rates.
        freeze: patterns of names of parameters that are not trained.
        lora: train low-rank adapters instead of the weights.
        arguments: arguments of transformers' `TrainingArguments`; `bf16` may also be "auto": true if it is faster here.
        output: the folder of the finished checkpoint. The run keeps its own files in its subfolder "run".
    """

    about: About | None = None
    objective: Literal[
        "dense", "contrastive", "answers", "distillation", "transcription", "alignment", "classification"
    ]
    model: ContrastiveSection | ClassifierSection | OmniSection | EncoderSection
    train: Data
    evaluate: Data | None = None
    optimizer: Optimizer
    freeze: list[Pattern] = []
    lora: Lora | None = None
    arguments: dict[str, Any]
    output: str = Field(min_length=1)

    @classmethod
    def read(cls, path: str | Path, overrides: list[str] | None = None) -> "Recipe":
        """Read a recipe and apply `key.subkey=value` overrides (values are JSON, or else text).

        Raises:
            RecipeError: the file is missing or holds no JSON object, a key is unknown, a value has the wrong type, an
                override names no section, or a world is not installed.
        """
        try:
            recipe = read_json(Path(path))
        except OSError as error:
            raise RecipeError(f"The recipe {str(path)!r} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise RecipeError(f"The recipe {str(path)!r} is not JSON: {error}.") from error
        return cls.parse(recipe, path, overrides)

    @classmethod
    def parse(cls, recipe: Any, path: str | Path, overrides: Sequence[str] | None = None) -> "Recipe":
        """As `read`, from the parsed JSON of the file at `path`."""
        if not isinstance(recipe, dict):
            raise RecipeError(f"The recipe {str(path)!r} should be a JSON object, found a {type(recipe).__name__}.")
        for override in overrides or []:
            key, sign, text = override.partition("=")
            if not sign:
                raise RecipeError(f"An override looks like key=value, found {override!r}.")
            *parents, last = key.split(".")
            place = recipe
            for parent in parents:
                if not isinstance(place.get(parent), dict):
                    raise RecipeError(f"{key!r} names nothing in {path}: there is no section {parent!r}.")
                place = place[parent]
            try:
                place[last] = json.loads(text)
            except json.JSONDecodeError:
                place[last] = text
        try:
            json.dumps(recipe, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RecipeError(
                f"The recipe {str(path)!r} holds text that is not valid Unicode: {error.reason}."
            ) from error
        try:
            return cls.model_validate(recipe)
        except ValidationError as error:
            for cause in (found.get("ctx", {}).get("error") for found in error.errors()):
                if isinstance(cause, WorldError):
                    raise RecipeError(f"The recipe {str(path)!r} cannot be followed: {cause}") from error
            problems = [_problem(found["loc"], found["msg"]) for found in error.errors()]
            raise RecipeError(f"The recipe {str(path)!r} is not valid: {'; '.join(problems)}.") from error

    @model_validator(mode="before")
    @classmethod
    def _model_of_objective(cls, recipe: Any) -> Any:
        if isinstance(recipe, dict) and isinstance(recipe.get("model"), dict) and recipe.get("objective") in SECTIONS:
            return {**recipe, "model": SECTIONS[recipe["objective"]].model_validate(recipe["model"])}
        return recipe

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        every = [*sources_of(self.train), *sources_of(self.evaluate)]
        if self.objective == "dense" and any(isinstance(data, Files) for data in every):
            raise ValueError("the objective 'dense' needs to know what covers each patch, which only scenes tell")
        if self.objective == "classification" and any(isinstance(data, Drawn) for data in every):
            raise ValueError("the objective 'classification' learns from your own files; give their `path`")
        if isinstance(self.evaluate, Mixture):
            raise ValueError("`evaluate` is about one source; evaluate the others by `omni evaluate`")
        if self.objective == "dense" and isinstance(self.train, Mixture):
            raise ValueError("the objective 'dense' draws from one world; leave `sources` out")
        for data in every:
            if isinstance(data, Drawn):
                data.check(self.objective)
        if self.objective not in TALKS and self.caches:
            raise ValueError(
                "`cache` is for the objective 'answers': others train the encoder, whose tokens it would keep"
            )
        for name in _FOR_ANSWERS:
            if self.objective not in TALKS and self.arguments.get(name):
                raise ValueError(f"`arguments.{name}` is for the objective 'answers', whose language model it is about")
        if self.lora and (self.objective not in TALKS or self.freeze):
            raise ValueError("`lora` is for the objective 'answers', and freezes what it does not train: drop `freeze`")
        if self.lora and isinstance(self.model, OmniSection) and (self.model.checkpoint is None or self.model.sections):
            raise ValueError(
                "`lora` leaves adapters alone, to be loaded with the model that they were trained for: give a `checkpoint`, "
                "and no `image` or `modalities`"
            )
        return self

    @property
    def caches(self) -> bool:
        """Whether a source has a cache of encoded items."""
        every = [*sources_of(self.train), *sources_of(self.evaluate)]
        return any(isinstance(data, Files) and data.cache is not None for data in every)

    @field_validator("arguments")
    @classmethod
    def _known_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        return check_arguments(arguments)

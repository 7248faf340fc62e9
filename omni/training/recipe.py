"""A recipe: one JSON file that says what is trained, from what, on what, how, and what to expect of it."""

import json
import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

from huggingface_hub.errors import StrictDataclassError
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from safetensors import SafetensorError

from omni.data.manifests import Manifest
from omni.files import read_json
from omni.worlds import WorldError, find_world


class RecipeError(ValueError):
    """A recipe that cannot be followed. The message is one sentence: what was expected, what was found, what to do."""


@contextmanager
def said_by_recipe(key: str, value: Any) -> Iterator[None]:
    """Inside, the value that a recipe has at `key` is made use of; what goes wrong is a `RecipeError` that names both."""
    try:
        yield
    except (ValueError, OSError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise RecipeError(f"Correct `{key}` of the recipe, as {value!r} cannot be used: {error}") from error


class Strict(BaseModel):
    """Unknown keys raise: a typo never becomes a default. Numbers are finite, as JSON's are."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, dict) and (unknown := sorted(set(values) - set(cls.model_fields))):
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"unknown {names}; what can be set here is {', '.join(cls.model_fields)}")
        return values


def _is_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression ({error}); put a backslash before its signs") from error
    return text


Pattern = Annotated[str, AfterValidator(_is_pattern)]
"""A regular expression for names of parameters or modules."""


def _problem(place: tuple[int | str, ...], message: str) -> str:
    where = [".".join(map(str, place))] if place else []
    return ": ".join([*where, message.removeprefix("Value error, ")])


class About(Strict):
    """What a reader wants to know before spending hours."""

    makes: str
    hardware: str
    time: str
    expect: str


class Drawn(Strict):
    """Examples that a world makes while training. Each world has a class of its own, see `omni.worlds`."""

    @abstractmethod
    def check(self, objective: str) -> None:
        """Raise ValueError where this objective does not learn what is drawn."""

    @abstractmethod
    def conversations(self) -> Any:
        """The `omni.data.conversations.Example` of each number, for the objective "answers"."""

    @abstractmethod
    def captions(self) -> Any:
        """The picture and the caption of each number, and `caption(number)`, for the objective "contrastive"."""

    @abstractmethod
    def sayings(self) -> Any:
        """The sound and what is said in it of each number, and `transcript(number)`, for "transcription" and "alignment"."""

    def asked_by(self) -> list[str]:
        """The modalities of items that ask in the place of words, see `OmniProcessor`."""
        return []

    @abstractmethod
    def texts(self) -> Iterable[str]:
        """What is said about the pictures, for a new tokenizer."""


class Files(Strict):
    """A user's own data: a folder or file that `Manifest.read` understands.

    `root` is where its files are, if not beside it; `prompt` is the question to rows that have an answer alone. `addresses`
    allows addresses, and is the folder in which what is there is kept. `cache` is a folder for what frozen encoders say of
    the items, at most so many gigabytes of it.
    """

    path: str
    root: str | None = None
    prompt: str | None = None
    addresses: str | None = None
    cache: str | None = None
    cache_gigabytes: float = Field(default=20.0, gt=0)

    def manifest(self) -> Manifest:
        """The rows. Raises `ManifestError` if they cannot be read."""
        return Manifest.read(self.path, root=self.root, prompt=self.prompt, addresses=self.addresses)


def _read_data(data: Any) -> Any:
    if isinstance(data, Drawn | Files | Mixture):
        return data
    kind: type[Strict] = (
        find_world().data if not isinstance(data, dict) or not {"path", "sources"} & data.keys() else Files
    )
    return (Mixture if isinstance(data, dict) and "sources" in data else kind).model_validate(data)


class Part(Strict):
    """One source of a mixture; examples are drawn from it in proportion to its weight."""

    data: Annotated[SerializeAsAny[Drawn | Files], PlainValidator(_read_data)]
    weight: float = Field(default=1.0, gt=0, le=1e6)


class Mixture(Strict):
    """Several sources of examples at once: one's own files, and what a world draws."""

    sources: list[Part] = Field(min_length=2)


Data = Annotated[SerializeAsAny[Drawn | Files | Mixture], PlainValidator(_read_data)]
"""With a `path` files of one's own; with `sources` several of them; without, examples of the world that is drawn."""


def sources_of(data: Drawn | Files | Mixture | None) -> list[Drawn | Files]:
    """The sources of some data."""
    return [part.data for part in data.sources] if isinstance(data, Mixture) else [] if data is None else [data]


class Optimizer(Strict):
    """Muon on matrices and AdamW on the rest, or AdamW on all; learning rates by parameter-name pattern."""

    name: Literal["muon", "adamw"] = "muon"
    lr: float = Field(gt=0, le=1e30)  # beyond, torch cannot multiply by it
    weight_decay: float = Field(default=0.0, ge=0)
    lr_scale: dict[Pattern, Annotated[float, Field(ge=0, le=1e6)]] = {}


class Lora(Strict):
    """Low-rank adapters instead of the weights themselves (Hu et al. 2021), by peft.

    `target_modules` is a pattern that must match whole names of modules; `modules_to_save` are trained entirely and saved
    with the adapter, such as "image_projector", or "embed_tokens" for answers in words that the model never said.
    """

    r: int = Field(default=8, gt=0)
    alpha: int = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Pattern
    modules_to_save: list[str] = []


class EncoderSection(Strict):
    """The model of the objectives "dense" and "transcription".

    `encoder` is a folder to go on from; without it the encoder is new. `config` overrides its configuration.
    """

    encoder: str | None = None
    config: dict[str, Any] = {}


class ContrastiveSection(EncoderSection):
    """The model of the objective "contrastive": beside the encoder a text encoder, which is always new.

    `text` is the configuration of any text encoder of transformers, with its `model_type`; `vocab_size` that of the
    tokenizer made for it; `projection_dim` the width of the space where both meet.
    """

    text: dict[str, Any]
    vocab_size: int = Field(default=1024, gt=256)
    projection_dim: int = Field(default=128, gt=0)


class OmniSection(Strict):
    """The model of the objectives "answers", "distillation" and "alignment".

    Either `checkpoint`, a fused model to go on from, or a new one: `thinker`, the JSON configuration of a language model,
    with a tokenizer of at most `vocab_size` tokens made of the training texts, and `modalities`: by name the section of
    each, with the folder of a trained `encoder`. With a checkpoint, an `encoder` in a section gives its weights to the
    tower; other settings replace those of the section, and the projector is new; a modality that it lacks is added. `image`
    is short for the section of that name. `config` overrides the configuration of the checkpoint or of all encoders.
    """

    checkpoint: str | None = None
    thinker: str | None = None
    vocab_size: int = Field(default=1024, gt=256)
    modalities: dict[str, dict[str, Any]] = {}
    image: dict[str, Any] | None = None
    config: dict[str, Any] = {}

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The section of each modality."""
        return {**self.modalities, **({"image": self.image} if self.image is not None else {})}

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        whole = bool(self.sections) and all("encoder" in section for section in self.sections.values())
        if (self.checkpoint is None) == (self.thinker is None) or (self.thinker is not None and not whole):
            raise ValueError(
                "give either `checkpoint`, or `thinker` and the sections of `modalities`, each with its `encoder`"
            )
        if self.image is not None and "image" in self.modalities:
            raise ValueError("`image` and `modalities.image` are the same section; give one of them")
        return self


TALKS = ("answers", "distillation")
"""The objectives by which a fused model learns to answer."""

SECTIONS: dict[str, type[Strict]] = {
    "dense": EncoderSection,
    "contrastive": ContrastiveSection,
    "answers": OmniSection,
    "distillation": OmniSection,
    "transcription": EncoderSection,
    "alignment": OmniSection,
}


class Recipe(Strict):
    """Everything that `omni train` needs.

    Attributes:
        about: for whoever reads it; nothing depends on it.
        freeze: patterns of parameter names that stay as they are.
        arguments: of transformers' `TrainingArguments`; `bf16` may also be "auto", which is true where it is faster.
        output: the folder of the finished checkpoint; the run's own files are in its subfolder "run".
    """

    about: About | None = None
    objective: Literal["dense", "contrastive", "answers", "distillation", "transcription", "alignment"]
    model: ContrastiveSection | OmniSection | EncoderSection
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
            RecipeError: no such file, no JSON object in it, an unknown key, a wrong type, an override that names no place,
                or a world that is not installed.
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
        """As `read`, of what is in the file at `path`."""
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
        """Whether encoded items are kept."""
        every = [*sources_of(self.train), *sources_of(self.evaluate)]
        return any(isinstance(data, Files) and data.cache is not None for data in every)

    @field_validator("arguments")
    @classmethod
    def _known_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        from transformers import TrainingArguments  # here, since it takes seconds and a recipe is read to be trained

        known = {field.name for field in fields(TrainingArguments) if field.init} - {"output_dir"}
        if unknown := sorted(set(arguments) - known):
            raise ValueError(f"TrainingArguments of transformers knows no {', '.join(map(repr, unknown))}")
        if (bf16 := arguments.get("bf16", False)) not in (True, False, "auto"):  # Trainer would take any text for true
            raise ValueError(f'`bf16` is true, false or "auto", found {bf16!r}')
        types = get_type_hints(TrainingArguments)
        for name, value in arguments.items():  # transformers takes anything, and fails over it or goes wrong much later
            if name == "bf16" and value == "auto":
                continue
            try:
                TypeAdapter(types[name]).validate_python(value, strict=True)
            except ValidationError as error:
                raise ValueError(f"`{name}` cannot be {value!r}: {error.errors()[0]['msg']}") from error
        for name, value in arguments.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or (name, value) == ("max_steps", -1):
                continue
            if not math.isfinite(value):
                raise ValueError(f"`{name}` should be a finite number, found {value}")
            if value < (least := 1 if name in _AT_LEAST_ONE else 0):
                raise ValueError(f"`{name}` should be at least {least}, found {value}")
            if value > (most := _AT_MOST.get(name, 2**63 - 1)):
                raise ValueError(f"`{name}` should be at most {most}, found {value}")
        if arguments.get("num_train_epochs", 1) == 0:
            raise ValueError("`num_train_epochs` should be more than 0, found 0")
        if arguments.get("label_smoothing_factor"):
            raise ValueError(
                "`label_smoothing_factor` has no meaning here, as each objective has its own loss; drop it"
            )
        if arguments.get("save_only_model"):
            raise ValueError("`save_only_model` leaves out what a run is resumed from, so that it would begin anew")
        return arguments


_AT_LEAST_ONE = {
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
}
_AT_MOST = {"seed": 2**32 - 1, "data_seed": 2**32 - 1, "dataloader_num_workers": 1024}
_FOR_ANSWERS = ("neftune_noise_alpha", "activation_checkpointing", "gradient_checkpointing")

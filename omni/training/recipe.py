"""A recipe: one JSON file that names the objective, the model, the data and the settings of a training run."""

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
    """A recipe cannot be followed. The message is one sentence: what was expected, what was found, what to do."""


@contextmanager
def said_by_recipe(key: str, value: Any) -> Iterator[None]:
    """Inside, the recipe's value at `key` is used. An error there becomes a `RecipeError` that names key and value."""
    try:
        yield
    except (ValueError, OSError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise RecipeError(f"Correct `{key}` of the recipe, as {value!r} cannot be used: {error}") from error


class Strict(BaseModel):
    """A section of a recipe. Unknown keys raise, so a typo never becomes a default. Numbers are finite."""

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
    """What a reader wants to know before a run of hours. Nothing depends on it."""

    makes: str
    hardware: str
    time: str
    expect: str


class Drawn(Strict):
    """Examples that a world generates during training. Each world has its own subclass, see `omni.worlds`."""

    @abstractmethod
    def check(self, objective: str) -> None:
        """Raise ValueError if this objective cannot learn from these examples."""

    @abstractmethod
    def conversations(self) -> Any:
        """A sequence of `omni.data.conversations.Example`, for the objective "answers"."""

    @abstractmethod
    def captions(self) -> Any:
        """A sequence of (picture, caption), with a method `caption(index)`, for the objective "contrastive"."""

    @abstractmethod
    def sayings(self) -> Any:
        """A sequence of (sound, transcript), with a method `transcript(index)`, for "transcription" and "alignment"."""

    def asked_by(self) -> list[str]:
        """The modalities whose items may ask the question instead of words, see `OmniProcessor`."""
        return []

    @abstractmethod
    def texts(self) -> Iterable[str]:
        """Texts of the world, to train a new tokenizer on."""


class Files(Strict):
    """A user's own data: a folder or file that `Manifest.read` understands.

    Attributes:
        path: the folder or file.
        root: the folder of its items; by default the one that holds `path`.
        prompt: the question for rows that have only an answer.
        addresses: a folder for downloaded items; without it, rows with web addresses are refused.
        allow_private: download from this machine and private networks, too.
        cache: a folder for the tokens that frozen encoders make of the items.
        cache_gigabytes: the largest size of `cache`.
    """

    path: str
    root: str | None = None
    prompt: str | None = None
    addresses: str | None = None
    allow_private: bool = False
    cache: str | None = None
    cache_gigabytes: float = Field(default=20.0, gt=0)

    def manifest(self) -> Manifest:
        """The rows. Raises `ManifestError` if they cannot be read."""
        return Manifest.read(
            self.path,
            root=self.root,
            prompt=self.prompt,
            addresses=self.addresses,
            allow_private=self.allow_private,
        )


def _read_data(data: Any) -> Any:
    if isinstance(data, Drawn | Files | Mixture):
        return data
    kind: type[Strict] = (
        find_world().data if not isinstance(data, dict) or not {"path", "sources"} & data.keys() else Files
    )
    return (Mixture if isinstance(data, dict) and "sources" in data else kind).model_validate(data)


class Part(Strict):
    """One source of a mixture. Examples are drawn from it in proportion to its weight."""

    data: Annotated[SerializeAsAny[Drawn | Files], PlainValidator(_read_data)]
    weight: float = Field(default=1.0, gt=0, le=1e6)


class Mixture(Strict):
    """Several sources of examples at once: files, and examples of a world."""

    sources: list[Part] = Field(min_length=2)


Data = Annotated[SerializeAsAny[Drawn | Files | Mixture], PlainValidator(_read_data)]
"""With `path`, the user's files; with `sources`, a mixture; with neither, examples of a world."""


def sources_of(data: Drawn | Files | Mixture | None) -> list[Drawn | Files]:
    """The sources of a mixture; any other data are their own only source; none for None."""
    return [part.data for part in data.sources] if isinstance(data, Mixture) else [] if data is None else [data]


class Optimizer(Strict):
    """Muon on matrices and AdamW on the rest, or AdamW on all.

    `lr_scale` maps a pattern of parameter names to a factor on the learning rate.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = Field(gt=0, le=1e30)  # beyond, torch cannot multiply by it
    weight_decay: float = Field(default=0.0, ge=0)
    lr_scale: dict[Pattern, Annotated[float, Field(ge=0, le=1e6)]] = {}


class Lora(Strict):
    """Low-rank adapters instead of the weights themselves (Hu et al. 2021), by peft.

    Attributes:
        r: rank of the adapters.
        alpha: their scale is `alpha / r`.
        dropout: probability in front of the adapters.
        target_modules: a pattern that must match a module's whole name.
        modules_to_save: modules that are trained in full and saved with the adapter, such as "image_projector", or
            "embed_tokens" if the model is to answer in new words.
    """

    r: int = Field(default=8, gt=0)
    alpha: int = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Pattern
    modules_to_save: list[str] = []


class EncoderSection(Strict):
    """The model of the objectives "dense" and "transcription".

    `encoder` is the folder of an encoder to continue from; without it the encoder is new. `config` overrides its
    configuration.
    """

    encoder: str | None = None
    config: dict[str, Any] = {}


class ClassifierSection(EncoderSection):
    """The model of the objective "classification": an encoder of any modality, and a new linear head.

    `encoder` may also be a folder of transformers, or of a fused model or a classifier with this encoder.

    Attributes:
        modality: what is classified; by default what the encoder encodes, and pictures for a new one.
        output: what the head reads: "cls", "grid" (the mean over the grid) or "cls+grid".
        size: height and width of the pictures in pixels; by default the encoder's. A smaller size trains faster.
    """

    modality: str | None = None
    output: Literal["cls", "grid", "cls+grid"] = "cls+grid"
    size: int | None = Field(default=None, ge=1)


class ContrastiveSection(EncoderSection):
    """The model of the objective "contrastive": the encoder, and a text encoder, which is always new.

    Attributes:
        text: the configuration of any text encoder of transformers, with its `model_type`.
        vocab_size: size of the tokenizer that is trained for it.
        projection_dim: width of the space that pictures and texts share.
    """

    text: dict[str, Any]
    vocab_size: int = Field(default=1024, gt=256)
    projection_dim: int = Field(default=128, gt=0)


class OmniSection(Strict):
    """The model of the objectives "answers", "distillation" and "alignment".

    Give either `checkpoint`, or `thinker` and `modalities`.

    Attributes:
        checkpoint: a fused model to continue from.
        thinker: the JSON configuration of a language model, which then starts from random weights.
        vocab_size: the largest size of the new Thinker's tokenizer, which is trained on the training texts.
        modalities: the section of each modality by name, with the folder of a trained `encoder`. With a checkpoint, the
            tower takes the weights of `encoder`; other settings replace those of the section, and its projector is new;
            a modality that the checkpoint lacks is added.
        image: short for `modalities.image`.
        config: overrides the configuration of the checkpoint, or of all encoders.
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
    "classification": ClassifierSection,
}


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
        from transformers import TrainingArguments  # imported here because it takes seconds

        known = {field.name for field in fields(TrainingArguments) if field.init} - {"output_dir"}
        arguments = _installed_names(arguments, known)
        if unknown := sorted(set(arguments) - known):
            raise ValueError(f"TrainingArguments of transformers knows no {', '.join(map(repr, unknown))}")
        if (bf16 := arguments.get("bf16", False)) not in (True, False, "auto"):  # for Trainer any text is true
            raise ValueError(f'`bf16` is true, false or "auto", found {bf16!r}')
        types = get_type_hints(TrainingArguments)
        for name, value in arguments.items():  # transformers does not check types, and fails much later
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


def _installed_names(arguments: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Arguments for computing activations twice, under the name that the installed transformers has for them.

    It is "activation_checkpointing" in transformers 5.23 and newer, and "gradient_checkpointing" before.
    """
    new, old = "activation_checkpointing", "gradient_checkpointing"
    name, other = (new, old) if new in known else (old, new)
    if both := sorted(set(arguments) & {key.replace(other, name) for key in arguments if key.startswith(other)}):
        raise ValueError(f"{', '.join(map(repr, both))} is given twice, also as {other!r}; give it once")
    return {key.replace(other, name): value for key, value in arguments.items()}


_AT_LEAST_ONE = {
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
}
_AT_MOST = {"seed": 2**32 - 1, "data_seed": 2**32 - 1, "dataloader_num_workers": 1024}
_FOR_ANSWERS = ("neftune_noise_alpha", "activation_checkpointing", "gradient_checkpointing")

"""The sections of a recipe: data, optimizer, adapters, and the model of each objective."""

import re
from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    SerializeAsAny,
    model_validator,
)

from omni.data.manifests import Manifest
from omni.worlds import find_world


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

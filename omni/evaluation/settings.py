"""What is evaluated: the settings of each kind of evaluation. A world brings its own."""

from abc import abstractmethod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from omni.worlds import find_world, worlds

from .asking import Questionnaire
from .manifest import ManifestQuestions


class Strict(BaseModel):
    """Refuses unknown keys, so that another kind of document is not taken for one of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Asking(Strict):
    """Settings of an evaluation of a fused model. Each subclass is about other examples, which its field `about` names.

    Attributes:
        sight: run the sight test, too, of each modality that the examples have.
        strangers: items or questions unlike training that the model should recognise; see `omni.evaluation.knowing`.
        batch_size: number of questions in a batch.
        max_new_tokens: number of tokens after which an answer is stopped.
        dtype: precision of the weights; "auto" for the one that the checkpoint names.
    """

    sight: bool = False
    strangers: str | None = None
    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=192, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @abstractmethod
    def questionnaire(self) -> Questionnaire:
        """The examples that these settings describe."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The examples in a few words, for the heading of a table."""


class ManifestSettings(Asking):
    """A fused model on the rows of a manifest; see `ManifestQuestions`."""

    about: Literal["manifest"] = "manifest"
    data: str
    root: str | None = None
    prompt: str | None = None
    addresses: str | None = None
    allow_private: bool = False

    def questionnaire(self) -> ManifestQuestions:
        """The rows of the manifest. Raises `ManifestError` if it cannot be read."""
        return ManifestQuestions(self.data, self.root, self.prompt, self.addresses, self.allow_private)

    @property
    def title(self) -> str:
        """The examples in a few words, for the heading of a table."""
        return self.data


class ClassSettings(Strict):
    """A classifier on the rows of a manifest; see `omni.evaluation.classes`."""

    about: Literal["classes"] = "classes"
    data: str
    root: str | None = None
    addresses: str | None = None
    allow_private: bool = False
    batch_size: int = Field(default=64, ge=1)

    def questionnaire(self) -> ManifestQuestions:
        """The rows of the manifest. Raises `ManifestError` if it cannot be read."""
        return ManifestQuestions(self.data, self.root, None, self.addresses, self.allow_private)

    @property
    def title(self) -> str:
        """The examples in a few words, for the heading of a table."""
        return self.data


class Probing(Strict):
    """Settings of an evaluation of an encoder."""

    batch_size: int = Field(default=64, ge=1)


class EncoderSettings(Probing):
    """An encoder on `pictures` held-out pictures of each sort. `fit_pictures` others are fitted on; see `probing`."""

    about: Literal["encoder"] = "encoder"
    pictures: int = Field(default=500, ge=10)
    fit_pictures: int = Field(default=1500, ge=100)
    first: int = Field(default=0, ge=0)
    kinds: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        """The examples in a few words, for the heading of a table."""
        return f"{self.pictures} held-out pictures of each sort"


class PictureSettings(Probing):
    """An encoder on the labelled pictures of a data set; see `across`.

    Attributes:
        data, root: the data set, and the folder that its relative paths start from.
        queries: the groups that ask; they are not searched. By default each group asks all others.
        kinds: what to ask, see `across`; by default everything. Copies alone need no labels.
        pictures: number of pictures that copies are made of, at most.
    """

    about: Literal["pictures"] = "pictures"
    data: str
    root: str | None = None
    queries: tuple[str, ...] = ()
    kinds: tuple[Literal["same label", "kind", "near-duplicate"], ...] = ("same label", "kind", "near-duplicate")
    pictures: int = Field(default=500, ge=1)

    @property
    def title(self) -> str:
        """The examples in a few words, for the heading of a table."""
        return self.data


Settings = Asking | ClassSettings | EncoderSettings | PictureSettings


OWN: dict[str, type[Settings]] = {
    "manifest": ManifestSettings,
    "classes": ClassSettings,
    "encoder": EncoderSettings,
    "pictures": PictureSettings,
}
"""The settings of this module, by their `about`."""


def read_settings(value: Any) -> Settings:
    """The settings in a document, by their `about`. Raises ValueError if they are of no known kind."""
    if isinstance(value, Settings):
        return value
    about = value.get("about") if isinstance(value, dict) else None
    if about not in (*OWN, *worlds()):
        raise ValueError(f"`about` is one of {', '.join([*worlds(), *OWN])}, found {about!r}")
    kind: type[Settings] = OWN[about] if about in OWN else find_world(about).settings
    return kind.model_validate(value)

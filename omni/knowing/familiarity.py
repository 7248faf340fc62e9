"""The document `familiarity.json` of a checkpoint: statistics of the training data. It has its own seal
(`checkpoints/seal.py`).

The document names the fingerprints of the weights that it was measured on. It is not valid for other weights, and is refused
beside them.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from omni.checkpoints.folder import CONFIG, FAMILIARITY, CheckpointError, base_of, named, read_object
from omni.checkpoints.seal import KNOWING, seal
from omni.files import write_text_whole
from omni.registry import get_modality

from .confidence import Calibration
from .statistics import Spread, Wording, gist, words

FORMAT: Literal["omni familiarity 1"] = "omni familiarity 1"


class Familiar(BaseModel):
    """Whether the inputs of a model are like those of training.

    Attributes:
        items: for each item in order, whether it is; None if not known.
        question: whether the words of the question are; None if not known or if there are no words.
    """

    model_config = ConfigDict(frozen=True)

    items: list[bool | None]
    question: bool | None

    @property
    def strange(self) -> bool:
        """Whether something is unlike training."""
        return self.question is False or False in self.items

    def note(self, modalities: Sequence[str]) -> str | None:
        """One sentence about the inputs that are unlike training; None if there are none.

        Args:
            modalities: the modality of each item.
        """
        places: dict[str, list[int]] = {}
        for place, (name, familiar) in enumerate(zip(modalities, self.items, strict=True), start=1):
            if familiar is False:
                places.setdefault(get_modality(name).noun, []).append(place)
        alone = len(self.items) == 1
        said = [
            f"the {noun}" if alone else f"{noun} {' and '.join(map(str, numbers))}" for noun, numbers in places.items()
        ]
        said += ["the question"] if self.question is False else []
        if not said:
            return None
        sentence, many = " and ".join(said), len(said) > 1 or any(len(numbers) > 1 for numbers in places.values())
        return f"{sentence[0].upper()}{sentence[1:]} {'are' if many else 'is'} unlike what the model was trained on."


class Familiarity(BaseModel):
    """Statistics of the training data of a checkpoint.

    Attributes:
        format: name and version of this format.
        weights: fingerprints of the weights that it was measured on.
        items: for each modality, the distribution of its encoder's tokens. Other modalities are not known.
        question: the distribution of the words of questions; None if not known.
        calibration: turns token probabilities into the probability that an answer is right; None if not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["omni familiarity 1"] = FORMAT
    weights: dict[str, str]
    items: dict[str, Spread] = {}
    question: Wording | None = None
    calibration: Calibration | None = None

    def judge(self, items: Iterable[tuple[str, Any]], tokenizer: Any, question: str) -> Familiar:
        """Whether items and a question are like those of training.

        Args:
            items: pairs of a modality and an `EncodedItem`.
            tokenizer: the Thinker's tokenizer.
            question: the text of the question.
        """
        asked = words(tokenizer, question) if self.question is not None else []
        return Familiar(
            items=[self.items[name].knows(gist(item.tokens)) if name in self.items else None for name, item in items],
            question=self.question.knows(asked) if self.question is not None and asked else None,
        )

    def confidence(self, logprobs: Sequence[float]) -> float | None:
        """The probability that an answer is right, from the log-probabilities of its tokens; None if not known."""
        return None if self.calibration is None else round(self.calibration.confidence(logprobs), 4)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The document in the folder of a checkpoint; None if there is none.

        Raises:
            CheckpointError: it is damaged, or was measured on other weights.
        """
        path = folder / FAMILIARITY
        if not path.exists():
            return None
        try:
            found = cls.model_validate(read_object(path))
        except ValidationError as error:
            raise CheckpointError(
                f"{named(path)} is not what omni writes ({error.errors()[0]['msg']}); remove it, or run `omni checkpoint "
                "familiarise`."
            ) from error
        if found.weights != weights_of(folder):
            raise CheckpointError(
                f"{named(path)} was measured on other weights than those beside it; remove it, or run `omni checkpoint "
                "familiarise`."
            )
        return found

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete the document and its seal from the folder of a checkpoint."""
        for name in (KNOWING, FAMILIARITY):
            (folder / name).unlink(missing_ok=True)

    def write(self, folder: Path) -> None:
        """Write the document with the fingerprints of the weights in the folder, and seal it."""
        there = self.model_copy(update={"weights": weights_of(folder)})
        write_text_whole(folder / FAMILIARITY, there.model_dump_json() + "\n")
        seal(folder, KNOWING)


def weights_of(folder: Path) -> dict[str, str]:
    """Fingerprints of the weights of a checkpoint, with a hash of its adapters if it has any."""
    base = base_of(folder)
    marks = dict(read_object(base / CONFIG).get("fingerprints") or {})
    if base != folder:
        with (folder / "adapter_model.safetensors").open("rb") as file:
            marks["adapters"] = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    return marks

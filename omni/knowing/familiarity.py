"""The document `familiarity.json` of a checkpoint: what training was like. It has a seal of its own (`checkpoints/seal.py`).

It names the weights that it was measured on, by their fingerprints. For other weights it says nothing that is true, so it
is refused beside them.
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
from .statistics import Spread, Wording, vector, words

FORMAT: Literal["omni familiarity 1"] = "omni familiarity 1"


class Familiar(BaseModel):
    """Whether what a model was given is like what it was trained on; None where that is not known.

    Attributes:
        items: for each item, in order.
        question: of its words; None also where nothing is asked in words.
    """

    model_config = ConfigDict(frozen=True)

    items: list[bool | None]
    question: bool | None

    @property
    def strange(self) -> bool:
        """Whether something is unlike training."""
        return self.question is False or False in self.items

    def note(self, modalities: Sequence[str]) -> str | None:
        """One sentence about what is unlike training; None if nothing is.

        Args:
            modalities: that of each item.
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
    """What training was like.

    Attributes:
        format: of this document.
        weights: fingerprints of the weights that it was measured on.
        items: by modality, how its encoder's tokens are spread. A modality that is not there is not known.
        question: the words of questions; None if not known.
        calibration: how sure answers are; None if no held-out rows told.
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
            items: the modality of each, and its `EncodedItem`.
            tokenizer: the Thinker's.
            question: its words.
        """
        asked = words(tokenizer, question) if self.question is not None else []
        return Familiar(
            items=[self.items[name].knows(vector(item.tokens)) if name in self.items else None for name, item in items],
            question=self.question.knows(asked) if self.question is not None and asked else None,
        )

    def confidence(self, logprobs: Sequence[float]) -> float | None:
        """The probability that an answer with tokens of these log-probabilities is right; None if not known."""
        return None if self.calibration is None else round(self.calibration.confidence(logprobs), 4)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The document in the folder of a checkpoint; None if there is none, so that nothing is known.

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
        """Take the document and its seal out of the folder of a checkpoint."""
        for name in (KNOWING, FAMILIARITY):
            (folder / name).unlink(missing_ok=True)

    def write(self, folder: Path) -> None:
        """Write the document into the folder of a checkpoint, as measured on the weights there, and seal it."""
        there = self.model_copy(update={"weights": weights_of(folder)})
        write_text_whole(folder / FAMILIARITY, there.model_dump_json() + "\n")
        seal(folder, KNOWING)


def weights_of(folder: Path) -> dict[str, str]:
    """Fingerprints of the weights of a checkpoint; of adapters also a hash of theirs."""
    base = base_of(folder)
    marks = dict(read_object(base / CONFIG).get("fingerprints") or {})
    if base != folder:
        with (folder / "adapter_model.safetensors").open("rb") as file:
            marks["adapters"] = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    return marks

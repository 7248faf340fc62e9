"""What an evaluation leaves behind: one JSON document with the scores, and with hashes of all that they rest on.

A score says something about these weights, shown these pictures, asked in these words. Each of them has a hash of its
own, so that of two results that differ one can tell what changed; `Result.differences` does.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, SerializeAsAny, ValidationError

from omni.data.manifests import PROMPT
from omni.loading.checkpoint import ADAPTERS, base_of
from omni.worlds import WorldError, find_world, worlds

from .asking import Questionnaire
from .manifest import ManifestQuestions
from .scores import Asked, EvaluationError, Score, SightTest

FORMAT: Literal["omni evaluation 1"] = "omni evaluation 1"


class Strict(BaseModel):
    """Unknown keys raise: a document of another kind does not pass for one of ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --- What is evaluated ------------------------------------------------------------------------------------------------


class Asking(Strict):
    """What a fused model is asked. What the questions are about says a class of its own, by its field `about`.

    With `sight`, the sight test too.
    """

    sight: bool = False
    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=192, ge=1)

    @abstractmethod
    def questionnaire(self) -> Questionnaire:
        """The questions of these settings."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What is asked about, for the heading of a table."""


class ManifestSettings(Asking):
    """A fused model on the rows of somebody's manifest; see `ManifestQuestions`."""

    about: Literal["manifest"] = "manifest"
    data: str
    root: str | None = None
    prompt: str = PROMPT

    def questionnaire(self) -> ManifestQuestions:
        """The questions of the manifest; raises `ManifestError` where it cannot be read."""
        return ManifestQuestions(self.data, self.root, self.prompt)

    @property
    def title(self) -> str:
        """For the heading of a table."""
        return self.data


class EncoderSettings(Strict):
    """An encoder: `pictures` held-out pictures of each sort, and `fit_pictures` others to learn from; see `encoder`."""

    about: Literal["encoder"] = "encoder"
    pictures: int = Field(default=500, ge=10)
    fit_pictures: int = Field(default=1500, ge=100)
    first: int = Field(default=0, ge=0)
    kinds: tuple[str, ...] | None = None
    batch_size: int = Field(default=64, ge=1)

    @property
    def title(self) -> str:
        """For the heading of a table."""
        return f"{self.pictures} held-out pictures of each sort"


Settings = Asking | EncoderSettings
OWN: dict[str, type[Settings]] = {"manifest": ManifestSettings, "encoder": EncoderSettings}
"""Settings by what they are about; those of worlds come from there."""


def _read_settings(value: Any) -> Settings:
    if isinstance(value, Settings):
        return value
    about = value.get("about") if isinstance(value, dict) else None
    if about not in (*OWN, *worlds()):
        raise ValueError(f"`about` is one of {', '.join([*worlds(), *OWN])}, found {about!r}")
    kind: type[Settings] = OWN[about] if about in OWN else find_world(about).settings
    return kind.model_validate(value)


# --- The document -----------------------------------------------------------------------------------------------------


class Hashes(Strict):
    """sha256 of what the scores rest on, and of what came out.

    Attributes:
        weights: the files of the model in the checkpoint folder: config.json, generation_config.json, *.safetensors; of
            adapters theirs, and those of their model.
        data: the pictures and the expected answers.
        prompts: the tokens of every prompt; None if nothing was asked in words.
        preprocessing: settings of the image processor, tokenizer and chat template.
        answers: every question with its answer, in order.
    """

    weights: str
    data: str
    prompts: str | None
    preprocessing: str
    answers: str


class Difference(Strict):
    """One thing that is not as it was."""

    what: str
    then: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: {self.then} then, {self.now} now"


class Result(Strict):
    """The scores of a checkpoint, and what is needed to measure the same again.

    Attributes:
        checkpoint: the folder, as it was given.
        device: where and in which precision the model ran.
        stopped: answers that did not end by themselves within `max_new_tokens`.
    """

    format: Literal["omni evaluation 1"] = FORMAT
    checkpoint: str
    settings: Annotated[SerializeAsAny[Settings], PlainValidator(_read_settings)]
    date: str
    seconds: float
    versions: dict[str, str]
    device: str
    hashes: Hashes
    stopped: int
    scores: list[Score]
    sight: SightTest | None = None

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a document that `omni evaluate --output` wrote.

        Raises:
            EvaluationError: no such file, no JSON, or JSON of another kind.
            WorldError: it is about a world that is not installed.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise EvaluationError(f"The result {str(path)!r} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise EvaluationError(f"The result {str(path)!r} is not JSON: {error}.") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            for cause in (found.get("ctx", {}).get("error") for found in error.errors()):
                if isinstance(cause, WorldError):
                    raise cause from error
            problems = [
                ": ".join([*map(str, found["loc"][-1:]), found["msg"].removeprefix("Value error, ")])
                for found in error.errors()
            ]
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise EvaluationError(
                f"{str(path)!r} is not a result that `omni evaluate --output` wrote: {'; '.join(problems[:3])}{more}."
            ) from error

    def write(self, path: str | Path) -> None:
        """Write the document that `read` reads; replaces the file."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def score(self, kind: str) -> Score:
        """The score of one kind of question."""
        return next(score for score in self.scores if score.kind == kind)

    def differences(self, now: "Result") -> list[Difference]:
        """What differs in another result of the same settings: hashes first, then the scores by kind."""
        found = [
            Difference(what=name, then=_short(getattr(self.hashes, name)), now=_short(getattr(now.hashes, name)))
            for name in Hashes.model_fields
            if getattr(self.hashes, name) != getattr(now.hashes, name)
        ]
        found += _compare(self._all_scores(), now._all_scores())
        for what, then, later in (
            ("sight test", self.sight and self.sight.passed, now.sight and now.sight.passed),
            ("answers that were stopped", self.stopped, now.stopped),
        ):
            if then != later:
                found.append(Difference(what=what, then=str(then), now=str(later)))
        return found

    def _all_scores(self) -> dict[str, Score]:
        """Those of the sight test too, by what a reader calls them."""
        named = {f"score {s.kind!r}": s for s in self.scores}
        if self.sight is not None:
            named |= {f"score of all with {shown} pictures": s for shown, s in self.sight.overall.items()}
            for shown, scores in self.sight.scores.items():
                named |= {f"score {s.kind!r} with {shown} pictures": s for s in scores}
        return named


def _compare(then: dict[str, Score], now: dict[str, Score]) -> list[Difference]:
    """Scores that are not the same to the last bit; told as they print, and in full where that shows nothing."""
    found = []
    for what in dict.fromkeys([*then, *now]):
        pair = then.get(what), now.get(what)
        if pair[0] != pair[1]:
            texts = [f"{s.accuracy:.3f} of {s.n:,} ({s.low:.3f} - {s.high:.3f})" if s else "none" for s in pair]
            if texts[0] == texts[1]:
                texts = [s.model_dump_json(exclude={"kind"}) if s else "none" for s in pair]
            found.append(Difference(what=what, then=texts[0], now=texts[1]))
    return found


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"


# --- Hashes -----------------------------------------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """The same text for the same values, whatever the order of keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def hash_lines(lines: Iterable[Any]) -> str:
    """sha256 of values, one canonical JSON line each."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(canonical(line).encode() + b"\n")
    return digest.hexdigest()


def hash_files(files: Iterable[Path]) -> str:
    """sha256 of the names and the bytes of files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def hash_weights(folder: str | Path) -> str:
    """Of the files that make the model: those in a checkpoint folder, and before adapters those of their model."""
    folders = dict.fromkeys([base_of(Path(folder)), Path(folder)])
    kinds = ("*.safetensors", "config.json", "generation_config.json", ADAPTERS)
    return hash_files(path for each in folders for path in sorted(path for kind in kinds for path in each.glob(kind)))


def hash_preprocessing(processor: Any) -> str:
    """Of the preprocessors' settings, the tokenizer and the chat template of a fused model's processor."""
    values = {key: value for key, value in processor.to_dict().items() if key != "modalities"}  # that is the model's
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:  # what the last batch asked for, and no property of the tokenizer
        vocabulary |= {"padding": None, "truncation": None}
    settings = {
        "class": type(tokenizer).__name__,
        "special_tokens": tokenizer.special_tokens_map,
        "clean_up": getattr(tokenizer, "clean_up_tokenization_spaces", None),
        "vocabulary": vocabulary,
    }
    return hash_lines([values, settings, processor.chat_template])


def hash_answers(asked: Iterable[Asked]) -> str:
    """Of every question and its answer, in order."""
    return hash_lines([item.question, item.answer] for item in asked)


def write_answers(path: str | Path, asked: Iterable[Asked]) -> None:
    """Write every question with its expected and its given answer, one JSON object a line; replaces the file."""
    lines = (
        {
            "source": item.source,
            "kind": item.kind,
            "question": item.question,
            "expected": item.expected,
            "answer": item.answer,
            "right": item.right,
            "complete": item.complete,
        }
        for item in asked
    )
    Path(path).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

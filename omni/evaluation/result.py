"""The result of an evaluation: one JSON document with the scores, and with a hash of everything that they depend on.

A score depends on weights, pictures, prompts and preprocessing. Each has a hash of its own, so `Result.differences` can
name the one that changed between two results.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import PlainValidator, SerializeAsAny, ValidationError

from omni.files import expect_ordinary, write_text_whole
from omni.registry import get_modality
from omni.worlds import WorldError

from .classes import ClassScore, Confusion
from .knowing import Reliability, Strangers
from .language import LanguageTest
from .scores import Asked, EvaluationError, Score, SightTest
from .settings import Settings, Strict, read_settings

FORMAT: Literal["omni evaluation 1"] = "omni evaluation 1"


class Hashes(Strict):
    """sha256 of everything that the scores depend on, and of the answers.

    Attributes:
        weights: the model's files in the checkpoint folder: config.json, generation_config.json, *.safetensors. For
            adapters, their files and those of their base model.
        data: the items and the expected answers.
        prompts: the tokens of every prompt; None for an encoder and a classifier, which read none.
        preprocessing: settings of the preprocessors, tokenizer and chat template.
        answers: every question with its answer, in order.
    """

    weights: str
    data: str
    prompts: str | None
    preprocessing: str
    answers: str


class Difference(Strict):
    """One hash, score or version that differs between two results."""

    what: str
    then: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: {self.then} then, {self.now} now"


class Result(Strict):
    """The scores of a checkpoint, with all that is needed to measure them again.

    Attributes:
        checkpoint: the folder, as the caller named it.
        settings: what was asked.
        date, seconds: when the evaluation ended, and how long it took.
        versions: versions of Python and of the packages.
        device: device and precision of the model.
        hashes: sha256 of weights, data, prompts, preprocessing and answers.
        stopped: number of answers that did not end within `max_new_tokens`.
        scores: the scores by kind of question.
        sight: the sight test of the pictures, if it was asked for.
        senses: the same test of each other modality.
        language: the language test, where the checkpoint names the language model that it was made with.
        reliability: whether answers are right as often as the model is sure; None if the checkpoint does not know.
        strangers: how well the model recognises strangers, if some were named.
        classes, confusions: of a classifier, the score of each class, and the largest confusions.
    """

    format: Literal["omni evaluation 1"] = FORMAT
    checkpoint: str
    settings: Annotated[SerializeAsAny[Settings], PlainValidator(read_settings)]
    date: str
    seconds: float
    versions: dict[str, str]
    device: str
    hashes: Hashes
    stopped: int
    scores: list[Score]
    sight: SightTest | None = None
    senses: dict[str, SightTest] = {}
    language: LanguageTest | None = None
    reliability: Reliability | None = None
    strangers: list[Strangers] = []
    classes: list[ClassScore] = []
    confusions: list[Confusion] = []

    @property
    def sight_tests(self) -> dict[str, SightTest]:
        """The sight test of each modality that was tested."""
        return {**({"image": self.sight} if self.sight else {}), **self.senses}

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a document that `omni evaluate --output` wrote.

        Raises:
            EvaluationError: the file is missing, is no JSON, or is another kind of document.
            WorldError: the document is about a world that is not installed.
        """
        try:
            text = expect_ordinary(Path(path)).read_text(encoding="utf-8")
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
        """Write the document for `read`. An existing file is replaced."""
        write_text_whole(Path(path), self.model_dump_json(indent=2) + "\n")

    def score(self, kind: str) -> Score:
        """The score of one kind of question."""
        return next(score for score in self.scores if score.kind == kind)

    def differences(self, now: "Result") -> list[Difference]:
        """The differences of another result with the same settings: hashes first, then scores by kind."""
        found = [
            Difference(what=name, then=_short(getattr(self.hashes, name)), now=_short(getattr(now.hashes, name)))
            for name in Hashes.model_fields
            if getattr(self.hashes, name) != getattr(now.hashes, name)
        ]
        found += _compare(self._all_scores(), now._all_scores())
        tests = [("sight test", self.sight, now.sight)]
        for name in {**self.senses, **now.senses}:
            what = f"sight test of {get_modality(name).noun}s"
            tests.append((what, self.senses.get(name), now.senses.get(name)))
        if self.language != now.language:
            found.append(Difference(what="language test", then=_spoken(self.language), now=_spoken(now.language)))
        verdicts = [(what, then and then.passed, later and later.passed) for what, then, later in tests]
        for what, then, later in (*verdicts, ("answers that were stopped", self.stopped, now.stopped)):
            if then != later:
                found.append(Difference(what=what, then=str(then), now=str(later)))
        return found

    def _all_scores(self) -> dict[str, Score]:
        """All scores, those of the sight test included, by a name for messages."""
        named = {f"score {s.kind!r}": s for s in self.scores}
        for name, test in self.sight_tests.items():
            what = f"{get_modality(name).noun}s"
            named |= {f"score of all with {shown} {what}": s for shown, s in test.overall.items()}
            for shown, scores in test.scores.items():
                named |= {f"score {s.kind!r} with {shown} {what}": s for s in scores}
        return named


def _compare(then: dict[str, Score], now: dict[str, Score]) -> list[Difference]:
    """Scores that differ in any bit, as rounded text, or in full where the rounded texts are equal."""
    found = []
    for what in dict.fromkeys([*then, *now]):
        pair = then.get(what), now.get(what)
        if pair[0] != pair[1]:
            texts = [f"{s.accuracy:.3f} of {s.n:,} ({s.low:.3f} - {s.high:.3f})" if s else "none" for s in pair]
            if texts[0] == texts[1]:
                texts = [s.model_dump_json(exclude={"kind"}) if s else "none" for s in pair]
            found.append(Difference(what=what, then=texts[0], now=texts[1]))
    return found


def _spoken(test: LanguageTest | None) -> str:
    return f"{test.same} of {test.n}, perplexity {test.perplexity:.6g}" if test else "none"


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"


def write_answers(path: str | Path, asked: Iterable[Asked]) -> None:
    """Write every question with its expected and its given answer, one JSON object a line. Replaces an existing file."""
    lines = (
        {
            "source": each.source,
            "kind": each.kind,
            "question": each.question,
            "expected": each.expected,
            "answer": each.answer,
            "right": each.right,
            "complete": each.complete,
            "confidence": each.confidence,
        }
        for each in asked
    )
    write_text_whole(Path(path), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

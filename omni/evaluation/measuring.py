"""Evaluate a checkpoint folder (`evaluate`), or evaluate it once more and compare the results (`measure_again`)."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from omni.checkpoints.folder import CheckpointError, base_of, model_type_of, prompt_of
from omni.classification.configuration_classifier import OmniClassifierConfig
from omni.data.collate import expect_taken
from omni.data.conversations import ExampleError
from omni.fusion.configuration_omni import OmniConfig
from omni.loading.checkpoint import load
from omni.loading.classifier import load_classifier
from omni.loading.encoder import load_encoder
from omni.registry import get_modality
from omni.worlds import find_world

from .across import evaluate_across
from .asking import Items, Questionnaire, ask_all
from .classes import ClassScore, Confusion, class_scores, classify_rows, confusions
from .hashes import hash_answers, hash_lines, hash_preprocessing, hash_weights
from .knowing import Reliability, Strangers, find_strangers, reliability
from .language import LanguageTest, language_test
from .probing import Progress, evaluate_encoder
from .result import Difference, Hashes, Result
from .scores import SIGHTS, Asked, Evaluation, EvaluationError, Sight, SightTest, score, sight_test
from .settings import Asking, ClassSettings, EncoderSettings, ManifestSettings, PictureSettings, Probing, Settings

PACKAGES = {
    "omni": "omni-thinker",
    **{name: name for name in ("transformers", "torch", "numpy", "pillow", "scikit-learn")},
}


@dataclass(frozen=True)
class Outcome:
    """A result, with the answers behind it.

    Attributes:
        result: the scores and hashes.
        asked: every question with its answer to the real pictures.
        items: returns the items of a question, given its `Asked.example`.
        examples: number of examples.
    """

    result: Result
    asked: Sequence[Asked]
    items: Callable[[int], Items]
    examples: int


KINDS: dict[str, Literal["fused", "classifier"]] = {
    OmniConfig.model_type: "fused",
    OmniClassifierConfig.model_type: "classifier",
}


def kind_of(checkpoint: str | Path) -> Literal["fused", "classifier", "encoder"]:
    """The kind of model in a folder, by the `model_type` of its configuration. Adapters have the kind of their base model.

    Raises:
        CheckpointError: there is no folder, or no configuration in it.
    """
    return KINDS.get(model_type_of(base_of(Path(checkpoint))), "encoder")


def choose_settings(checkpoint: str | Path, **options: Any) -> Settings:
    """The settings that fit a checkpoint and the data: with `data` of its rows; else an encoder's, or those of a world.

    Raises:
        CheckpointError: there is no configuration in the folder.
        EvaluationError: an option belongs to another evaluation, or is out of range; or a classifier has no `data`.
        WorldError: the world is not installed.
    """
    settings: type[Settings]
    kind = kind_of(checkpoint)
    if kind == "encoder":
        settings = PictureSettings if "data" in options else EncoderSettings
    elif kind == "classifier":
        settings = ClassSettings
        if "data" not in options:
            raise EvaluationError(
                f"{str(checkpoint)!r} is a classifier; name the rows that it is to classify with --data."
            )
    else:
        settings = ManifestSettings if "data" in options else find_world().settings
    what = settings.model_fields["about"].default
    if strangers := sorted(set(options) - set(settings.model_fields)):
        raise EvaluationError(
            f"{str(checkpoint)!r} is evaluated as {what!r}, which does not take {', '.join(map(_option, strangers))}; it "
            f"takes {', '.join(_option(name) for name in settings.model_fields if name != 'about')}."
        )
    if settings is ManifestSettings and (trained := prompt_of(checkpoint)):
        options.setdefault("prompt", trained)
    try:
        return settings(**options)
    except ValidationError as error:
        found = error.errors()[0]
        name = _option(str(found["loc"][0]))
        raise EvaluationError(f"{name} of {what!r}: {found['msg']}, found {found['input']!r}.") from error


def _option(name: str) -> str:
    """The name of the command's option."""
    return {"kinds": "--kind", "queries": "--query"}.get(name) or f"--{name.replace('_', '-')}"


def evaluate(
    checkpoint: str | Path,
    settings: Settings,
    progress: Progress = lambda label, done, total: None,
) -> Outcome:
    """Evaluate a checkpoint.

    Args:
        checkpoint: folder of a fused model; with the settings of an encoder, folder of an encoder.
        settings: what to ask.
        progress: called with the name of a step, the number done, and the total number.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or it is of another kind than the settings.
        EvaluationError, ManifestError, ItemError, WorldError: a question, a row, a file or a world is at fault.
    """
    found, wanted = kind_of(checkpoint), _wanted(settings)
    if found != wanted:
        names = {"fused": "a fused model", "encoder": "an encoder", "classifier": "a classifier"}
        raise CheckpointError(f"{str(checkpoint)!r} holds {names[found]}; this evaluation needs {names[wanted]}.")
    start = time.perf_counter()
    if isinstance(settings, EncoderSettings | PictureSettings):
        return _evaluate_encoder(checkpoint, settings, progress, start)
    if isinstance(settings, ClassSettings):
        return _evaluate_classifier(checkpoint, settings, progress, start)
    return _evaluate_fused(checkpoint, settings, progress, start)


def _wanted(settings: Settings) -> Literal["fused", "classifier", "encoder"]:
    if isinstance(settings, Probing):
        return "encoder"
    return "classifier" if isinstance(settings, ClassSettings) else "fused"


def _evaluate_classifier(checkpoint: str | Path, settings: ClassSettings, progress: Progress, start: float) -> Outcome:
    questions = settings.questionnaire()
    data_hash = questions.data_hash(lambda done: progress("reading files", done, len(questions)))
    classifier = load_classifier(checkpoint)
    asked = classify_rows(
        classifier, questions, settings.batch_size, lambda done: progress("classifying", done, len(questions))
    )
    hashes = Hashes(
        weights=hash_weights(checkpoint),
        data=data_hash,
        prompts=None,
        preprocessing=hash_lines([classifier.encoder.preprocessor.to_dict()]),
        answers=hash_answers(asked),
    )
    result = _result(
        checkpoint,
        settings,
        classifier.model,
        hashes,
        score(asked),
        start,
        stopped=0,
        classes=class_scores(asked),
        confusions=confusions(asked),
        reliability=reliability(asked),
    )
    return Outcome(result, asked, lambda example: questions[example].items, len(questions))


def _evaluate_encoder(
    checkpoint: str | Path, settings: EncoderSettings | PictureSettings, progress: Progress, start: float
) -> Outcome:
    encoder = load_encoder(checkpoint, "image")
    if isinstance(settings, PictureSettings):
        found = evaluate_across(encoder, settings, progress)
    else:
        found = evaluate_encoder(encoder, settings, progress)
    hashes = Hashes(
        weights=hash_weights(checkpoint),
        data=found.data_hash,
        prompts=None,
        preprocessing=hash_lines([encoder.preprocessor.to_dict()]),
        answers=hash_answers(found.asked),
    )
    result = _result(checkpoint, settings, encoder.model, hashes, found.scores, start, stopped=0)
    return Outcome(result, found.asked, lambda example: {"image": found.shown[example]()}, len(found.shown))


def _evaluate_fused(checkpoint: str | Path, settings: Asking, progress: Progress, start: float) -> Outcome:
    questions = settings.questionnaire()
    # first, so that an unreadable file is refused at once
    data_hash = questions.data_hash(lambda done: progress("reading files", done, len(questions)))
    model, processor = load(checkpoint, settings.dtype)
    try:
        expect_taken(settings.title, questions.modalities, processor.preprocessors)
    except ExampleError as error:
        raise EvaluationError(str(error)) from error
    if settings.sight and not questions.modalities:
        raise EvaluationError("No question is about an item, so the sight test has none to take away; leave it out.")

    strangers = []
    if settings.strangers is not None:  # before the questions, which take longer
        strangers = find_strangers(
            *(model, processor, questions, settings.strangers),
            lambda done: progress("looking for strangers", done, len(questions)),
        )

    def ask(sight: Sight, modality: str | None = None) -> list[Asked]:
        noun = get_modality(modality).noun if modality else "item"
        return ask_all(
            model,
            processor,
            questions,
            sight,
            modality,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            progress=lambda done: progress(f"asking, {sight} {noun}s", done, len(questions)),
        )

    asked = ask("real")
    real = Evaluation.of(asked, "real", questions.parts)
    tests = {name: _test_sight(real, name, questions, ask) for name in questions.modalities if settings.sight}
    hashes = Hashes(
        weights=hash_weights(checkpoint),
        data=data_hash,
        prompts=hash_lines(each.prompt for each in asked),
        preprocessing=hash_preprocessing(processor),
        answers=hash_answers(asked),
    )
    result = _result(
        checkpoint,
        settings,
        model,
        hashes,
        real.scores,
        start,
        stopped=sum(not each.complete for each in asked),
        sight=tests.pop("image", None),
        senses=tests,
        language=language_test(model, processor),
        reliability=reliability(asked),
        strangers=strangers,
    )
    return Outcome(result, asked, lambda example: questions[example].items, len(questions))


def _test_sight(
    real: Evaluation, modality: str, questions: Questionnaire, ask: Callable[[Sight, str], list[Asked]]
) -> SightTest:
    """The sight test of one modality; the items of the others are the real ones."""
    left_out: dict[Sight, str] = {}
    if get_modality(modality).stand_ins is None:
        left_out |= dict.fromkeys(("blank", "noise"), f"the plug-in of {modality!r} has none (`stand_ins`)")
    if reason := questions.why_not_swapped(modality):
        left_out["swapped"] = reason
    others = [sight for sight in SIGHTS if sight != "real" and sight not in left_out]
    if not others:
        why, noun = "; ".join(dict.fromkeys(left_out.values())), get_modality(modality).noun
        raise EvaluationError(f"Nothing can take the place of the {noun}s: {why}; leave the sight test out.")
    passes = [Evaluation.of(ask(sight, modality), sight, questions.parts) for sight in others]
    return sight_test([real, *passes], left_out)


def _result(
    checkpoint: str | Path,
    settings: Settings,
    model: Any,
    hashes: Hashes,
    scores: Sequence[Any],
    start: float,
    *,
    stopped: int,
    sight: SightTest | None = None,
    senses: Mapping[str, SightTest] | None = None,
    language: LanguageTest | None = None,
    reliability: Reliability | None = None,
    strangers: Sequence[Strangers] = (),
    classes: Sequence[ClassScore] = (),
    confusions: Sequence[Confusion] = (),
) -> Result:
    return Result(
        checkpoint=str(checkpoint),
        settings=settings,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - start, 1),
        versions={"python": platform.python_version(), **{name: _version(of) for name, of in PACKAGES.items()}},
        device=f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}",
        hashes=hashes,
        stopped=stopped,
        scores=list(scores),
        sight=sight,
        senses=dict(senses or {}),
        language=language,
        reliability=reliability,
        strangers=list(strangers),
        classes=list(classes),
        confusions=list(confusions),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # scikit-learn of the extra [eval], or omni itself where it is not installed
        return "not installed"


@dataclass(frozen=True)
class Comparison:
    """A result and the same evaluation done again.

    Attributes:
        differences: hashes and scores that differ; empty if all are equal.
        elsewhere: versions and devices that differ, which may be the cause.
        outcome: the new outcome; None if the model's weights changed and cannot be loaded.
    """

    differences: list[Difference]
    elsewhere: list[Difference]
    outcome: Outcome | None


def measure_again(
    expected: Result,
    checkpoint: str | Path | None = None,
    progress: Progress = lambda label, done, total: None,
) -> Comparison:
    """Evaluate again with the settings of a result, and compare the two.

    Args:
        expected: the earlier result.
        checkpoint: folder of the checkpoint. By default the one that the result names.
        progress: see `evaluate`.

    Raises:
        CheckpointError, EvaluationError, ManifestError, ItemError, WorldError: see `evaluate`. Weights that changed and
            cannot be loaded are a difference instead.
    """
    folder = checkpoint or expected.checkpoint
    try:
        outcome = evaluate(folder, expected.settings, progress)
    except CheckpointError as error:
        now = hash_weights(folder)
        if now == expected.hashes.weights or not (base_of(Path(folder)) / "config.json").is_file():
            raise
        weights = Difference(what="weights", then=expected.hashes.weights[:12], now=now[:12])
        return Comparison([weights, Difference(what="loading", then="worked", now=str(error))], [], None)
    now_result = outcome.result
    then, now_ = ({"device": result.device, **result.versions} for result in (expected, now_result))
    elsewhere = [
        Difference(what=key, then=then.get(key, "none"), now=now_.get(key, "none"))
        for key in dict.fromkeys([*then, *now_])
        if then.get(key) != now_.get(key)
    ]
    return Comparison(expected.differences(now_result), elsewhere, outcome)

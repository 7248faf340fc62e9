"""One evaluation from a folder to a result, and the same once more to compare: `evaluate` and `verify`."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import ValidationError

from omni.checkpoints.strict import CheckpointError
from omni.fusion.configuration_omni import OmniConfig
from omni.loading.checkpoint import base_of, load, model_type_of, prompt_of
from omni.loading.encoder import load_encoder
from omni.worlds import find_world

from .asking import ask_all
from .encoder import Progress, evaluate_encoder
from .result import (
    Asking,
    Difference,
    EncoderSettings,
    Hashes,
    ManifestSettings,
    Result,
    Settings,
    hash_answers,
    hash_lines,
    hash_preprocessing,
    hash_weights,
)
from .scores import SIGHTS, Asked, Evaluation, EvaluationError, Sight, SightTest, sight_test

PACKAGES = {
    "omni": "omni-thinker",
    **{name: name for name in ("transformers", "torch", "numpy", "pillow", "scikit-learn")},
}


@dataclass(frozen=True)
class Outcome:
    """A result with what it was counted from.

    Attributes:
        asked: every question with its answer; those with the real pictures.
        pictures: what a question was about, by its `Asked.item`.
        items: how many of these there are.
    """

    result: Result
    asked: Sequence[Asked]
    pictures: Callable[[int], Sequence[Image.Image]]
    items: int


def kind_of(checkpoint: str | Path) -> Literal["fused", "encoder"]:
    """What the configuration in a folder describes, by its `model_type`; adapters are of the kind of their model.

    Raises:
        CheckpointError: no folder, or no configuration in it.
    """
    return "fused" if model_type_of(base_of(Path(checkpoint))) == OmniConfig.model_type else "encoder"


def choose_settings(checkpoint: str | Path, **options: Any) -> Settings:
    """The settings that fit a checkpoint: of an encoder, of a manifest if `data` is given, else of the world that is drawn.

    Raises:
        CheckpointError: no configuration in the folder.
        EvaluationError: an option of another evaluation, or one out of range.
        WorldError: the world that is drawn is not installed.
    """
    settings: type[Settings]
    if kind_of(checkpoint) == "encoder":
        settings = EncoderSettings
    else:
        settings = ManifestSettings if "data" in options else find_world().settings
    what = settings.model_fields["about"].default
    if strangers := sorted(set(options) - set(settings.model_fields)):
        raise EvaluationError(
            f"{str(checkpoint)!r} is evaluated as {what!r}, for which there is no {', '.join(map(_option, strangers))}; "
            f"there are {', '.join(_option(name) for name in settings.model_fields if name != 'about')}."
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
    """As the command calls it."""
    return "--kind" if name == "kinds" else f"--{name.replace('_', '-')}"


def evaluate(
    checkpoint: str | Path,
    settings: Settings,
    progress: Progress = lambda label, done, total: None,
) -> Outcome:
    """Measure a checkpoint.

    Args:
        checkpoint: folder of a fused model, or with `EncoderSettings` of an encoder.
        settings: what to ask.
        progress: called with what is being done, how much of it is done, and of how much.

    Raises:
        CheckpointError: a checkpoint that cannot be loaded, or of another kind than the settings are for.
        EvaluationError, ManifestError, PictureError, WorldError: something else that cannot be evaluated as asked.
    """
    found, wanted = kind_of(checkpoint), "encoder" if isinstance(settings, EncoderSettings) else "fused"
    if found != wanted:
        names = {"fused": "a fused model, which answers questions", "encoder": "an encoder, which answers none"}
        raise CheckpointError(f"{str(checkpoint)!r} holds {names[found]}; what is asked needs {names[wanted]}.")
    start = time.perf_counter()
    if isinstance(settings, EncoderSettings):
        return _evaluate_encoder(checkpoint, settings, progress, start)
    return _evaluate_fused(checkpoint, settings, progress, start)


def _evaluate_encoder(checkpoint: str | Path, settings: EncoderSettings, progress: Progress, start: float) -> Outcome:
    encoder = load_encoder(checkpoint)
    found = evaluate_encoder(encoder, settings, progress)
    hashes = Hashes(
        weights=hash_weights(checkpoint),
        data=found.data_hash,
        prompts=None,
        preprocessing=hash_lines([encoder.image_processor.to_dict()]),
        answers=hash_answers(found.asked),
    )
    result = _result(checkpoint, settings, encoder.model, hashes, found.scores, start, stopped=0, sight=None)
    return Outcome(result, found.asked, lambda item: found.shown[item](), len(found.shown))


def _evaluate_fused(checkpoint: str | Path, settings: Asking, progress: Progress, start: float) -> Outcome:
    questions = settings.questionnaire()
    # first, so that what cannot be read is told at once
    data_hash = questions.data_hash(lambda done: progress("reading pictures", done, len(questions)))
    model, processor = load(checkpoint)
    if "image" not in processor.preprocessors:
        raise CheckpointError(
            f"The fused model in {str(checkpoint)!r} takes no pictures, so it cannot be asked about any."
        )
    if settings.sight and not any(questions[index].pictures for index in range(len(questions))):
        raise EvaluationError(
            "Nothing that is asked about has a picture, so the sight test has none to take away; drop it."
        )
    left_out: dict[Sight, str] = {}
    if settings.sight and (reason := questions.why_not_swapped()):
        left_out["swapped"] = reason
    passes: dict[Sight, list[Asked]] = {}
    for sight in (sight for sight in (SIGHTS if settings.sight else SIGHTS[:1]) if sight not in left_out):
        passes[sight] = ask_all(
            model,
            processor,
            questions,
            sight,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            progress=lambda done, sight=sight: progress(f"asking, {sight} pictures", done, len(questions)),  # type: ignore[misc]
        )
    asked = passes["real"]
    evaluations = [Evaluation.of(given, sight, questions.parts) for sight, given in passes.items()]
    hashes = Hashes(
        weights=hash_weights(checkpoint),
        data=data_hash,
        prompts=hash_lines(item.prompt for item in asked),
        preprocessing=hash_preprocessing(processor),
        answers=hash_answers(asked),
    )
    result = _result(
        checkpoint,
        settings,
        model,
        hashes,
        evaluations[0].scores,
        start,
        stopped=sum(not item.complete for item in asked),
        sight=sight_test(evaluations, left_out) if settings.sight else None,
    )
    return Outcome(result, asked, lambda item: questions[item].pictures, len(questions))


def _result(
    checkpoint: str | Path,
    settings: Settings,
    model: Any,
    hashes: Hashes,
    scores: Sequence[Any],
    start: float,
    *,
    stopped: int,
    sight: SightTest | None,
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
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # the extra [eval], or omni itself in a folder that was never installed
        return "not installed"


@dataclass(frozen=True)
class Verification:
    """The same evaluation, done again.

    Attributes:
        differences: what came out otherwise; none if everything is as it was.
        elsewhere: versions and devices that are not those of then, which may be why.
        outcome: of this time; None if the model cannot be loaded any more.
    """

    differences: list[Difference]
    elsewhere: list[Difference]
    outcome: Outcome | None


def verify(
    expected: Result,
    checkpoint: str | Path | None = None,
    progress: Progress = lambda label, done, total: None,
) -> Verification:
    """Do an evaluation again, with the settings that its result names, and compare.

    Args:
        expected: the result of then.
        checkpoint: another folder than that of then.
        progress: as in `evaluate`.

    Raises:
        as `evaluate`; but weights that changed and cannot be loaded any more are a difference.
    """
    folder = checkpoint or expected.checkpoint
    try:
        outcome = evaluate(folder, expected.settings, progress)
    except CheckpointError as error:
        now = hash_weights(folder)
        if now == expected.hashes.weights or not (base_of(Path(folder)) / "config.json").is_file():
            raise
        weights = Difference(what="weights", then=expected.hashes.weights[:12], now=now[:12])
        return Verification([weights, Difference(what="loading", then="worked", now=str(error))], [], None)
    now_result = outcome.result
    then, now_ = ({"device": result.device, **result.versions} for result in (expected, now_result))
    elsewhere = [
        Difference(what=key, then=then.get(key, "none"), now=now_.get(key, "none"))
        for key in dict.fromkeys([*then, *now_])
        if then.get(key) != now_.get(key)
    ]
    return Verification(expected.differences(now_result), elsewhere, outcome)

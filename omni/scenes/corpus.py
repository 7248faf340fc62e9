"""Spoken sayings on disk: FLAC files of 16 kHz, and a manifest that `omni train` and `omni check-data` read.

    python -m omni.scenes speak runs/voices --synthesizer espeak --count 20000
    python -m omni.scenes speak runs/voices --synthesizer piper --count 500 --split test --group stranger

A process makes the sayings of one synthesizer; several may run at the same time. A stopped one continues when run again.
Every row has `audio` and `text`, and beside these the `voice`, the `kind` of saying and, of a question about a scene, the
`scene`, `asks` (the kind of question), `answer` and `unseen` (see `Question`).
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .sayings import Saying, sample_saying
from .scene import stream
from .sounds import RATE
from .voices import Group, Samples, speak, voices

QUIET = 0.01
"""Before and after the words, samples below this share of the loudest one are silence."""
MARGIN = RATE // 20
APART = 10_000_000
"""Between the numbers of the first sayings of two synthesizers."""


def make(folder: Path, synthesizer: str, count: int, split: str, group: Group) -> Path:
    """Make the sayings 0 to `count - 1` of a synthesizer, those that are not there yet, and return the manifest."""
    manifest = folder / f"{split}-{group}-{synthesizer}.jsonl"
    sounds = folder / manifest.stem
    sounds.mkdir(parents=True, exist_ok=True)
    chosen = voices(group, synthesizer)
    if not chosen:
        raise ValueError(f"The group {group!r} has no voices of {synthesizer!r}.")
    done = len(manifest.read_text("utf-8").splitlines()) if manifest.exists() else 0
    first = APART * (1 + sorted({voice.synthesizer for voice in _all()}).index(synthesizer))
    with manifest.open("a", encoding="utf-8") as rows:
        for index in range(done, count):
            saying = sample_saying(first + index, split)
            rng = stream("voice", split, group, synthesizer, index)
            voice = rng.choice(chosen)
            samples = trimmed(speak(saying.text, voice, rng))
            path = sounds / f"{index:06}.flac"
            write(path, samples)
            rows.write(json.dumps({"audio": f"{sounds.name}/{path.name}", **_row(saying), "voice": str(voice)}) + "\n")
            rows.flush()
    return manifest


def _all() -> list[Any]:
    groups: tuple[Group, ...] = ("seen", "held_out", "stranger")
    return [voice for group in groups for voice in voices(group)]


def _row(saying: Saying) -> dict[str, Any]:
    row: dict[str, Any] = {"text": saying.heard, "kind": saying.kind}
    if saying.asks is not None:
        scene, question = saying.asks
        row |= {"scene": scene, "asks": question.kind, "answer": question.answer, "unseen": question.unseen}
    return row


def trimmed(samples: Samples) -> Samples:
    """Without the silence around it but for `MARGIN` samples."""
    loud = np.flatnonzero(np.abs(samples) > QUIET * np.abs(samples).max())
    return samples[max(loud[0] - MARGIN, 0) : loud[-1] + MARGIN] if len(loud) else samples


def write(path: Path, samples: Samples) -> None:
    """A FLAC file of 16 bits at `RATE`; what would be louder than full scale is made less loud."""
    loudest = float(np.abs(samples).max())
    import_module("soundfile").write(path, samples / max(1.0, loudest * 1.001), RATE, subtype="PCM_16")

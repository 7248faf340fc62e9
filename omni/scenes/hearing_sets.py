"""Manifests that ask a model by voice, of the test sayings of a corpus: what `omni evaluate --data` reads.

    python -m omni.scenes ask runs/voices
    omni evaluate checkpoints/omni_tiny --data runs/voices/asked-stranger.jsonl --sight

| manifest | items | question | answer |
|---|---|---|---|
| asked-GROUP | a picture and a spoken question about it | none | that of the typed question |
| said-GROUP | a saying | what is said | its words |
| beeps | beeps | a typed question | number, slope, pitch, timbre |

GROUP is seen, held_out or stranger (`omni.scenes.voices.Group`).
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .corpus import write
from .drawing import render
from .scene import sample_scene
from .sounds import beep_questions, sample_beeps

SPLIT = "test"
GROUPS = ("seen", "held_out", "stranger")
WHAT_IS_SAID = "what is said"


def write_sets(folder: Path, beeps: int = 250) -> list[Path]:
    """Write the manifests into the folder of a corpus, with their pictures and beeps, and return them."""
    written = []
    for group in GROUPS:
        rows = list(_said(folder, group))
        if rows:
            written.append(_write(folder / f"said-{group}.jsonl", (_transcript(row) for row in rows)))
            questions = [row for row in rows if row["kind"] == "question" and row["asks"] != "caption"]
            written.append(_write(folder / f"asked-{group}.jsonl", (_question(folder, row) for row in questions)))
    written.append(_write(folder / "beeps.jsonl", (row for number in range(beeps) for row in _beeps(folder, number))))
    return written


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _said(folder: Path, group: str) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(f"{SPLIT}-{group}-*.jsonl")):
        yield from map(json.loads, path.read_text("utf-8").splitlines())


def _transcript(row: dict[str, Any]) -> dict[str, Any]:
    kind = row["voice"].split("/")[0]
    return {"audio": row["audio"], "question": WHAT_IS_SAID, "answer": row["text"], "kind": kind}


def _question(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    picture = Path("pictures") / f"{row['scene']}.png"
    if not (folder / picture).exists():
        (folder / picture).parent.mkdir(exist_ok=True)
        render(sample_scene(row["scene"], SPLIT)).save(folder / picture)
    items = {"image": str(picture), "audio": row["audio"]}
    return {**items, "question": "", "answer": row["answer"], "kind": row["asks"]}


def _beeps(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    beeps = sample_beeps(number, SPLIT)
    audio = Path("beeps") / f"{number}.flac"
    (folder / audio).parent.mkdir(exist_ok=True)
    write(folder / audio, beeps.play())
    for question in beep_questions(beeps):
        yield {"audio": str(audio), "question": question.text, "answer": question.answer, "kind": question.kind}

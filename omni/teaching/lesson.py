"""What a user asks for, and the parts and data that it becomes."""

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, TypeAdapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from omni.data.manifests import Manifest, ManifestConversations, Row
from omni.data.sources import ManifestError
from omni.exchange.compose import Composition, compose
from omni.exchange.gguf import unpack
from omni.files import write_text_whole
from omni.training.recipe import Data, Files, Strict
from omni.worlds import World, WorldError, find_world

START, DATA, LANGUAGE_MODEL = "start", "data", "language_model"
"""Folders in that of a lesson."""

ITEMS = 200
"""So many examples to learn from are looked at before the first step."""

TEXT_SHARE = 0.1
"""Of the samples, where there are rows of text."""

HELD_OUT, MOST_HELD_OUT = 0.05, 200
"""Share of the rows of one's own data that are kept for the test, and at most so many of them."""


class Lesson(Strict):
    """What shall be learnt, from what.

    Attributes:
        language_model: folder of any causal language model, or a .gguf file.
        encoders: for each modality by its name the folder of an encoder.
        data: a folder or file that `Manifest.read` understands. None: the world that is drawn (`omni.worlds`).
        test: the same, held out. None: a twentieth of the rows of `data`.
        prompt: the question for rows that have a caption alone.
        objective: "answers", or "distillation", which keeps more of how the language model writes.
        text: rows without items, of which a tenth is mixed in, so that the language is kept.
        lora: whether the language model learns too, by low-rank adapters. By default the projectors alone learn.
        minutes: how long training may take. None: as long as the data ask for.
        overrides: `key.subkey=value`, put into the recipe.
    """

    language_model: str
    encoders: dict[str, str] = Field(min_length=1)
    data: str | None = None
    test: str | None = None
    prompt: str | None = None
    objective: Literal["answers", "distillation"] = "answers"
    text: str | None = None
    lora: bool = False
    minutes: float | None = Field(default=None, gt=0)
    overrides: list[str] = []


def join(lesson: Lesson, folder: Path, data: Any) -> Composition:
    """The parts, composed and saved in `folder`, each of them where it was; `data` is the section to learn from."""
    thinker = Path(lesson.language_model)
    if thinker.suffix == ".gguf":
        thinker = (
            folder / LANGUAGE_MODEL if (folder / LANGUAGE_MODEL).is_dir() else unpack(thinker, folder / LANGUAGE_MODEL)
        )
    read: Any = TypeAdapter(Data).validate_python(data)
    examples = ManifestConversations(read.manifest()) if isinstance(read, Files) else read.conversations()
    items: dict[str, list[Any]] = {}
    for index in range(0, len(examples), max(1, len(examples) // ITEMS)):
        for name, found in examples[index].items.items():
            items.setdefault(name, []).extend(found)
    composition = compose(dict(lesson.encoders), thinker, positions=True, items=items)
    if not (folder / START).is_dir():
        composition.save(folder / START, apart=True)
    return composition


def layers_for_lora(model: Any) -> str:
    """A pattern of the linear layers of a fused model's Thinker, whatever these are called."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return rf".*language_model.*\.({'|'.join(sorted(names))})"


def world_of(lesson: Lesson) -> World:
    """The world that a lesson without data is about.

    Raises:
        WorldError: it is not installed, or shows no items of one of the modalities.
    """
    world = find_world()
    shown = world.settings(**world.lesson["settings"]).questionnaire().modalities
    if lacking := sorted(lesson.encoders.keys() - {*shown}):
        raise WorldError(
            f"What is drawn has items of {' and '.join(shown)}, none of {' and '.join(lacking)}; name data of your own "
            "that have them."
        )
    return world


def data_of(lesson: Lesson, folder: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The sections `train` and `evaluate` of a recipe, and the number of rows to learn from."""
    assert lesson.data is not None
    rows = Manifest.read(lesson.data, prompt=lesson.prompt)
    if lesson.test is not None:
        both = {"train": lesson.data, "evaluate": lesson.test}
        prompt = {} if lesson.prompt is None else {"prompt": lesson.prompt}
        train, evaluate = ({"path": path} | prompt for path in both.values())
        return train, evaluate, len(rows)
    parts = _split(rows)
    (folder / DATA).mkdir(exist_ok=True)
    paths = [folder / DATA / f"{name}.jsonl" for name in ("train", "test")]
    for path, part in zip(paths, parts, strict=True):
        write_text_whole(path, "".join(json.dumps(_written(row), ensure_ascii=False) + "\n" for row in part))
    return {"path": str(paths[0])}, {"path": str(paths[1])}, len(parts[0])


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows to learn from, and those held out. Rows of the same files stay together.

    Raises:
        ManifestError: all rows are about the same files.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if any(file.data is not None or file.address is not None for file in row.files):
            raise ManifestError("The rows hold their files or addresses of them, so they are not split; name a test.")
        files = "\n".join(str(file.path) for file in row.files) or json.dumps(row.conversation)
        groups.setdefault(hashlib.sha256(files.encode()).hexdigest(), []).append(row)
    if len(groups) < 2:
        raise ManifestError("All rows are about the same files, so none can be held out; name a test of other files.")
    most = min(HELD_OUT * len(rows), MOST_HELD_OUT)
    held_out: list[Row] = []
    kept = sorted(groups)
    for group in islice(sorted(groups), len(groups) - 1):
        if held_out and len(held_out) + len(groups[group]) > most:
            break
        held_out += groups[kept.pop(0)]
    return [row for group in kept for row in groups[group]], held_out


def _written(row: Row) -> dict[str, Any]:
    """A row as it stands in a file."""
    files = iter(row.files)
    messages = [
        {
            **message,
            "content": [
                block if block["type"] == "text" else {**block, "path": os.path.abspath(next(files).path)}
                for block in message["content"]
            ],
        }
        for message in row.conversation
    ]
    more = {"kind": row.kind, "words": list(row.words)}
    return {"messages": messages, **{key: value for key, value in more.items() if value}}


def stored_in_half(model: Any) -> bool:
    """Whether a fused model's Thinker is in half precision."""
    return next(model.model.language_model.parameters()).dtype in (torch.bfloat16, torch.float16)

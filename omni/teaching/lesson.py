"""A lesson: the user's settings, and the composed model and the data that follow from them."""

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

from omni.data.checking import chosen
from omni.data.manifests import Manifest, ManifestConversations, Row
from omni.data.sources import ManifestError
from omni.exchange.compose import Composition, compose
from omni.exchange.gguf import unpack
from omni.files import write_text_whole
from omni.registry import get_modality
from omni.training.sections import Data, Files, Strict
from omni.worlds import World, WorldError, find_world

START, DATA, LANGUAGE_MODEL = "start", "data", "language_model"
"""Folders inside the folder of a lesson."""

ITEMS = 200
"""Training examples, drawn at random, whose items `compose` inspects."""

TEXT_SHARE = 0.1
"""Share of rows of text among the samples, if the lesson has any."""

HELD_OUT, MOST_HELD_OUT = 0.05, 200
"""Share of the user's rows that are held out for the test, and their largest number."""


class Lesson(Strict):
    """What is taught to which language model, from which data.

    Attributes:
        language_model: folder of any causal language model, or a .gguf file.
        encoders: the folder of an encoder for each modality by name.
        data: a folder or file that `Manifest.read` understands. None: a world (`omni.worlds`).
        test: held-out rows, in the same form. None: a twentieth of the rows of `data`.
        prompt: the question for rows that have only a caption.
        objective: "answers", or "distillation", which keeps more of the language model's style.
        text: rows without items. They become a tenth of the samples, so that the model keeps its language.
        lora: whether to train low-rank adapters of the language model, too. By default only the projectors are trained.
        minutes: how long training may take. None: as long as the data need.
        overrides: settings of the recipe, as `key.subkey=value`.
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
    """Compose the parts and save the result in the lesson's folder. The parts stay in their own folders.

    Args:
        lesson: the lesson.
        folder: the lesson's folder.
        data: the section `train` of the recipe.

    Raises:
        CheckpointError: a part cannot be used.
        ManifestError: the data have no items for one of the encoders.
    """
    read: Any = TypeAdapter(Data).validate_python(data)
    examples = ManifestConversations(read.manifest()) if isinstance(read, Files) else read.conversations()
    items: dict[str, list[Any]] = {}
    for index in chosen(len(examples), ITEMS):
        for name, found in examples[index].items.items():
            items.setdefault(name, []).extend(found)
    for name in sorted(lesson.encoders.keys() - items.keys()):
        raise ManifestError(
            f"None of {min(len(examples), ITEMS):,} rows of the data has a {get_modality(name).noun}, so the projector of "
            f"{name} would learn nothing; add rows with {get_modality(name).noun}s, or leave out its encoder."
        )
    thinker = Path(lesson.language_model)
    if thinker.suffix == ".gguf":
        thinker = (
            folder / LANGUAGE_MODEL if (folder / LANGUAGE_MODEL).is_dir() else unpack(thinker, folder / LANGUAGE_MODEL)
        )
    composition = compose(dict(lesson.encoders), thinker, positions=True, items=items)
    if not (folder / START).is_dir():
        composition.save(folder / START, apart=True)
    return composition


def layers_for_lora(model: Any) -> str:
    """A pattern that matches the linear layers of a fused model's Thinker."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return rf".*language_model.*\.({'|'.join(sorted(names))})"


def world_of(lesson: Lesson) -> World:
    """The world that a lesson without data learns from.

    Raises:
        WorldError: it is not installed, or has no items of one of the modalities.
    """
    world = find_world()
    shown = world.settings(**world.lesson["settings"]).questionnaire().modalities
    if lacking := sorted(lesson.encoders.keys() - {*shown}):
        raise WorldError(
            f"Generated scenes have items of {' and '.join(shown)}, none of {' and '.join(lacking)}; name data of your own "
            "that have them."
        )
    return world


def data_of(lesson: Lesson, folder: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The sections `train` and `evaluate` of the recipe, and the number of training rows.

    Raises:
        ManifestError: the rows cannot be read, or cannot be split.
    """
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
    """The training rows and the held-out rows. Rows about the same files stay together.

    Raises:
        ManifestError: all rows are about the same files, or a row holds its file or an address.
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
    """A row as a JSON object of a manifest."""
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

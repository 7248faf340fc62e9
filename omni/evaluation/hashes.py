"""The hashes of all that a score depends on: weights, data, prompts, preprocessing, and of the answers."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omni.checkpoints.folder import ADAPTERS, base_of

from .scores import Asked


def canonical(value: Any) -> str:
    """JSON that is equal for equal values, whatever the order of their keys."""
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
    """sha256 of the model's files in a checkpoint folder; for adapters, of their base model's files and their own."""
    folders = dict.fromkeys([base_of(Path(folder)), Path(folder)])
    kinds = ("*.safetensors", "config.json", "generation_config.json", ADAPTERS)
    return hash_files(path for each in folders for path in sorted(path for kind in kinds for path in each.glob(kind)))


def hash_preprocessing(processor: Any) -> str:
    """sha256 of the preprocessors' settings, the tokenizer and the chat template of a fused model's processor."""
    values = {key: value for key, value in processor.to_dict().items() if key != "modalities"}  # these are the model's
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:  # the settings of the last batch, no property of the tokenizer
        vocabulary |= {"padding": None, "truncation": None}
    settings = {
        "class": type(tokenizer).__name__,
        "special_tokens": tokenizer.special_tokens_map,
        "clean_up": getattr(tokenizer, "clean_up_tokenization_spaces", None),
        "vocabulary": vocabulary,
    }
    return hash_lines([values, settings, processor.chat_template])


def hash_answers(asked: Iterable[Asked]) -> str:
    """sha256 of every question with its answer, in order."""
    return hash_lines([each.question, each.answer] for each in asked)

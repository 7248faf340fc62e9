"""micro-Omni's files: the name and the file of each part. Reading a file never runs code from it.

    vision.pt     {"vit": encoder, "img_proj", "text_proj", "optimizer", ...}
    audio_enc.pt  {"enc": encoder, "head", "optimizer", ...}
    thinker.pt    {"model": Thinker, "optimizer", ...}
    omni.pt       {"thinker", "proj_a", "proj_v", "optimizer", ...}, without the encoders
    *.safetensors all parts, each under its prefix: thinker. vision_encoder. proj_v. ...
    config.json   settings of the parts, mixed with settings of training
    tokenizer.model

The contents of a file, not its name, tell what it is: a file may be called model.pt or vision_step_9000.pt, and may hold
tensors without a part around them. Names of tensors may contain `_orig_mod`, which torch.compile adds.
"""

import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from omni.files import expect_ordinary, read_json

Tensors = dict[str, torch.Tensor]
Config = Mapping[str, Any]

PLACES = {
    "vision_encoder": ("vision.pt", "vit"),
    "img_proj": ("vision.pt", "img_proj"),
    "text_proj": ("vision.pt", "text_proj"),
    "text_encoder": ("vision.pt", "text_encoder"),
    "temperature": ("vision.pt", "temperature"),
    "thinker": ("omni.pt", "thinker"),
    "proj_a": ("omni.pt", "proj_a"),
    "proj_v": ("omni.pt", "proj_v"),
    "image_token": ("omni.pt", "image_token"),
    "audio_encoder": ("audio_enc.pt", "enc"),
    "ctc_head": ("audio_enc.pt", "head"),
    "rvq": ("talker.pt", "rvq"),
    "talker": ("talker.pt", "talker"),
    "ocr": ("ocr.pt", "model"),
}
"""For each part of micro-Omni, by its prefix in a merged file: its own file and its key there. `image_token` is omni's
addition."""
THINKER_ALONE = ("thinker.pt", "model")
STATES = ("optimizer", "scheduler", "scaler", "ema", "monitor")
"""Entries of training in the files. They are not converted."""
MERGED = ("model.safetensors", "muomni.safetensors", "omni.safetensors")
TOKENIZER = "tokenizer.model"
CONFIG = "config.json"
UNSEEN = ("n_heads", "rope_theta", "normalize")
"""Settings that change a model's output and that its tensors do not show. Two configurations must agree on them."""
KEPT = "micro_omni.safetensors"
"""The file beside a converted checkpoint with the parts that omni does not have, and micro-Omni's configuration."""


class ConversionError(ValueError):
    """A file or a checkpoint cannot be converted. The message says which, why, and what to do."""


@dataclass
class Source:
    """The contents of micro-Omni's files.

    Attributes:
        parts: the tensors of each part, by name without prefix.
        config: micro-Omni's configuration, with one section for each part.
        tokenizer: the SentencePiece model, if there is one.
        files: the files that were read.
        left: names of entries that are not converted, such as "optimizer".
    """

    parts: dict[str, Tensors] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    files: list[Path] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def section(self, name: str) -> Config:
        """The settings of the "thinker" or of the "vision" encoder."""
        section = self.config.get(name) or {}
        if not isinstance(section, Mapping):
            raise ConversionError(
                f"The configuration has {section!r} as the section {name!r}; expected an object of settings."
            )
        return dict(section)


def listed(names: Sequence[str], most: int = 30) -> str:
    """Names as a part of a sentence, at most `most` of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"


def read(sources: Sequence[str | os.PathLike[str]]) -> Source:
    """Read files of micro-Omni, or folders of them.

    The config.json and the tokenizer.model beside a named file are read, too. So is vision.pt if there is a projector and
    no encoder, and audio_enc.pt.

    Raises:
        ConversionError: a file is missing, damaged, not micro-Omni's, or holds more than tensors; or two files hold the
            same part.
    """
    source = Source()
    named = [Path(each) for each in sources]
    for path in named:
        if not path.exists():
            raise ConversionError(f"{str(path)!r} does not exist; name files of micro-Omni, such as vision.pt.")
    files = [file for path in named for file in (_of_folder(path) if path.is_dir() else [path])]
    for file in files:
        _read_file(file, source)
    for folder in dict.fromkeys(file.parent for file in files if file.suffix in (".pt", ".safetensors")):
        for name in (CONFIG, TOKENIZER):
            file = folder / name
            known = name == TOKENIZER and source.tokenizer is not None
            if file.is_file() and not known and not any(file.samefile(each) for each in source.files):
                _read_file(file, source)
        for projector, encoder, stem in (
            ("proj_v", "vision_encoder", "vision"),
            ("proj_a", "audio_encoder", "audio_enc"),
        ):
            if projector in source.parts and encoder not in source.parts:
                for file in _newest(folder, stem):
                    _read_file(file, source)
    return source


def _of_folder(folder: Path) -> list[Path]:
    """micro-Omni's files in a folder: of each kind the file without a step number, or else the one of the last step."""
    stems = dict.fromkeys(file.removesuffix(".pt") for file, _ in [*PLACES.values(), THINKER_ALONE])
    weights = [file for stem in (*stems, "model") for file in _newest(folder, stem)]
    weights += [folder / name for name in MERGED if (folder / name).is_file()]
    if not weights:
        raise ConversionError(
            f"The folder {str(folder)!r} holds no file of micro-Omni's ({', '.join(f'{stem}.pt' for stem in stems)} or "
            f"{MERGED[0]}); name one."
        )
    return weights


def _newest(folder: Path, stem: str) -> list[Path]:
    if (folder / f"{stem}.pt").is_file():
        return [folder / f"{stem}.pt"]
    numbered = [
        (int(m[1]), file) for file in folder.glob(f"{stem}_step_*.pt") if (m := re.search(r"_(\d+)\.pt$", file.name))
    ]
    return [max(numbered)[1]] if numbered else []


def _read_file(path: Path, source: Source) -> None:
    if path.suffix == ".json":
        found = _read_config(path)
        if not found and path.name == CONFIG:
            return  # the config.json of something else
        _add_config(source, found, path)
    elif path.suffix == ".model":
        if source.tokenizer is not None:
            raise ConversionError(f"{str(source.tokenizer)!r} and {str(path)!r} are both tokenizers; name one of them.")
        source.tokenizer = path
    elif path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        _add_config(source, _beside_tensors(metadata, path), path)
        _add_parts(source, _by_prefix(_without_marks(path, tensors), path), path)
    else:
        _read_pickled(path, source)
    source.files.append(path)


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    try:
        with safe_open(expect_ordinary(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{str(path)!r} cannot be read ({error}); get the file again.") from error


def _read_pickled(path: Path, source: Source) -> None:
    content = _load(path)
    if not isinstance(content, Mapping):
        raise ConversionError(f"{str(path)!r} holds a {type(content).__name__}, expected a dictionary of parts.")
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):  # bare tensors
        return _add_parts(source, _by_prefix(_without_marks(path, content), path), path)
    keys = {key: part for part, (_, key) in PLACES.items() if key != "model"} | {part: part for part in PLACES}
    parts: dict[str, Tensors] = {}
    strange: list[str] = []
    for key, value in content.items():
        is_part = isinstance(value, Mapping) and all(isinstance(each, torch.Tensor) for each in value.values())
        if key == "config" and isinstance(value, Mapping):
            _add_config(source, value, path)
        elif key == "model" and is_part:
            parts |= _by_prefix(_without_marks(path, value), path)
        elif key in keys and is_part:
            parts[keys[key]] = _without_marks(path, value)
        elif key in STATES or not _has_tensors(value):  # such as a step, an epoch or a loss
            source.left.append(str(key))
        else:
            strange.append(str(key))
    if strange:
        raise ConversionError(
            f"{str(path)!r} holds entries that are no part of micro-Omni and have no place: {listed(strange)}."
        )
    return _add_parts(source, parts, path)


def _load(path: Path) -> Any:
    """The contents of a file of torch.save. Files that would run code are refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern pickles that are refused anyway
            return torch.load(expect_ordinary(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{asked[1]!r}" if asked else "more than tensors and numbers"
        raise ConversionError(
            f"{str(path)!r} asks for {what} when it is read, which can run code, so it is refused and nothing of it was "
            "run; if you trust its source, save its tensors alone and convert those."
        ) from error
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise ConversionError(
            f"{str(path)!r} is no file of torch.save, or it is damaged ({reason}); get the file again."
        ) from error


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _without_marks(path: Path, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors, with `_orig_mod` removed from their names."""
    plain: Tensors = {}
    for name, tensor in tensors.items():
        short = ".".join(word for word in name.split(".") if word != "_orig_mod")
        if short in plain:
            raise ConversionError(
                f"{str(path)!r} holds {short!r} twice, with and without '_orig_mod'; keep one of them."
            )
        plain[short] = tensor
    return plain


def _by_prefix(tensors: Tensors, path: Path) -> dict[str, Tensors]:
    """The parts of a merged file. Tensors without a prefix are one part; a name that only this part has tells which."""
    if "tok_emb.weight" in tensors:
        return {"thinker": tensors}
    if {"cls", "pos"} & set(tensors):
        return {"vision_encoder": tensors}
    if any(name.startswith("down.") for name in tensors):
        return {"audio_encoder": tensors}
    parts: dict[str, Tensors] = {}
    strange = []
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part in PLACES and rest:
            parts.setdefault(part, {})[rest] = tensor
        else:
            strange.append(name)
    if strange:
        raise ConversionError(
            f"{str(path)!r} holds tensors that belong to no part of micro-Omni ({', '.join(PLACES)}) and have no place: "
            f"{listed(strange)}."
        )
    return parts


def _add_parts(source: Source, parts: dict[str, Tensors], path: Path) -> None:
    for name in parts:
        if name in source.parts:
            raise ConversionError(f"{str(path)!r} holds a {name}, and so does a file before it; name one of them.")
    source.parts |= parts


def _read_config(path: Path) -> dict[str, Any]:
    """micro-Omni's configuration with one section for each part. Empty if the file is something else."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{str(path)!r} is no JSON ({error}); correct it, or move it elsewhere.") from error
    if not isinstance(values, dict) or values.get("model_type", "muomni") != "muomni":
        return {}
    sections = {name: values[name] for name in ("thinker", "vision", "audio") if isinstance(values.get(name), dict)}
    if sections:
        if "thinker" in sections and "ctx_len" in values:  # fine-tuning writes it outside of the section
            sections["thinker"] = {"ctx_len": values["ctx_len"], **sections["thinker"]}
        return {**values, **sections}
    if "img_size" in values or "patch" in values:
        return {"vision": values}
    if "downsample_time" in values:
        return {"audio": values}
    if "n_layers" in values and ("rope_theta" in values or "ctx_len" in values):
        return {"thinker": values}
    return {}


def _beside_tensors(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The configuration that `save_kept` writes into the metadata."""
    try:
        config = json.loads(metadata.get("config", "{}"))
    except ValueError as error:
        raise ConversionError(
            f"The configuration in {str(path)!r} is no JSON ({error}); get the file again."
        ) from error
    return config if isinstance(config, dict) else {}


def _add_config(source: Source, config: Mapping[str, Any], path: Path) -> None:
    for name, value in config.items():
        before = source.config.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            if apart := [key for key in UNSEEN if key in before and before[key] != value.get(key, before[key])]:
                raise ConversionError(
                    f"{str(path)!r} and a file before it do not agree on {', '.join(apart)} of {name!r}; name the one that "
                    "belongs to these weights, and move the other elsewhere."
                )
            value = {**value, **before}
        if before is None or isinstance(before, dict):
            source.config[name] = value


def read_kept(folder: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Parts and configuration that `save_kept` wrote beside a checkpoint. Both are empty if there is no such file."""
    if not (folder / KEPT).is_file():
        return {}, {}
    tensors, metadata = read_safetensors(folder / KEPT)
    return _by_prefix(tensors, folder / KEPT) if tensors else {}, _beside_tensors(metadata, folder / KEPT)

"""Write micro-Omni's files. A file is complete or does not exist, and no existing file is replaced."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from omni.exchange.micro_omni.files import CONFIG, PLACES, THINKER_ALONE, TOKENIZER, Config, ConversionError, Tensors


def save_kept(path: Path, parts: Mapping[str, Tensors], config: Config) -> None:
    """Write parts into one safetensors file, each under its prefix, with the configuration as metadata."""
    tensors = {f"{part}.{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
    # safetensors refuses tensors that share memory, so each is copied
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt", "config": json.dumps(config, sort_keys=True)},
    )


def save_theirs(path: Path, parts: Mapping[str, Tensors], config: Config, tokenizer: Path | None) -> None:
    """Write micro-Omni's files into a folder, or all parts into one .pt or .safetensors file.

    Raises:
        ConversionError: the name ends with .pt, but micro-Omni keeps these parts in several files.
    """
    places = dict(PLACES)
    if not {"proj_v", "proj_a"} & set(parts):
        places["thinker"] = THINKER_ALONE
    files: dict[str, dict[str, Any]] = {}
    for part, tensors in parts.items():
        file, key = places[part]
        files.setdefault(file, {})[key] = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    with finished(path) as unfinished:
        if path.suffix == ".safetensors":
            save_kept(unfinished, parts, config)
        elif path.suffix == ".pt":
            if len(files) > 1:
                raise ConversionError(
                    f"micro-Omni keeps these parts in several files ({', '.join(files)}), so they cannot go into "
                    f"{path.name!r}; name a folder, or a file that ends with .safetensors."
                )
            torch.save({**next(iter(files.values())), "config": config}, unfinished)
        else:
            unfinished.mkdir()
            for file, content in files.items():
                torch.save({**content, "config": config}, unfinished / file)
            text = json.dumps({**config, "model_type": "muomni"}, indent=2)
            (unfinished / CONFIG).write_text(text + "\n", encoding="utf-8")
            if tokenizer is not None:
                shutil.copyfile(tokenizer, unfinished / TOKENIZER)


def expect_free(path: Path) -> None:
    """Check that the output does not exist yet.

    Raises:
        ConversionError: `path` is a file, or a folder that is not empty.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConversionError(f"The output {str(path)!r} exists already, and nothing is overwritten; name another one.")


@contextmanager
def finished(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to. At the end it is renamed to `path`; after an error it is removed."""
    expect_free(path)
    unfinished = path.absolute().with_name(f".{path.name}.writing")
    try:
        _remove(unfinished)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise ConversionError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); make room for it, or name another place."
        ) from error
    finally:
        _remove(unfinished)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

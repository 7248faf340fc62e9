"""A language model in a GGUF file becomes a folder as transformers saves it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from omni.checkpoints.folder import CheckpointError, expect_new, named, new_folder
from omni.files import expect_ordinary


def unpack(file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the language model and the tokenizer of a GGUF file into a new folder.

    transformers reads the file, but does not save what it read from quantized numbers. So the numbers go into a model of
    the same configuration.

    Args:
        file: ends with .gguf.
        folder: a new one.
        dtype: precision of the weights.

    Raises:
        CheckpointError: a file that transformers cannot read.
        FileExistsError: `folder` exists and is not an empty folder.
    """
    expect_new(folder)
    place: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        expect_ordinary(file)
        read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **place)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
    except ImportError as error:
        raise CheckpointError("GGUF files need the package gguf: pip install 'omni-thinker[convert]'.") from error
    except Exception as error:  # the file may come from anywhere, and its reader may raise anything
        raise CheckpointError(
            f"{named(file)} cannot be read as a GGUF file of a language model ({error}); check the path, or get the file "
            "again."
        ) from error
    config = read.config
    vars(config).pop("quantization_config", None)
    config.dtype, config.name_or_path = dtype, ""
    model = type(read)(config).to(dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in read.state_dict().items()})
    model.generation_config = read.generation_config
    with new_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder

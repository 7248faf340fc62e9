"""Loading: `from_pretrained` of the shipped checkpoints, beside reading all tensors of the same file into memory, and beside
mapping that file, which reads nothing.

Stock models of the same size show which part of the time is transformers' own. omni's part checks every tensor.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, ViTModel

from benchmarks import peers
from benchmarks.measure import Call, Contestant, Race
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.vision.modeling_vision import OmniVisionModel


def races(quick: bool) -> Iterator[Race]:
    """One race for each checkpoint."""
    fused = OmniConfig.from_pretrained(peers.CHECKPOINTS / "omni_tiny")
    with TemporaryDirectory() as folder:
        yield _race("vision_tiny", OmniVisionModel, peers.vit(peers.omni()), ViTModel, Path(folder) / "vit")
        llava = peers.llava(fused, own_encoder=True)
        yield _race(
            "omni_tiny", OmniForConditionalGeneration, llava, LlavaForConditionalGeneration, Path(folder) / "llava"
        )


def _race(name: str, own: Any, stock: Any, stock_class: Any, folder: Path) -> Race:
    checkpoint = peers.CHECKPOINTS / name
    stock.save_pretrained(folder)
    calls: dict[str, Call] = {
        "safetensors.torch.load_file, mapped": partial(load_file, checkpoint / "model.safetensors"),
        "safetensors.torch.load_file, read": partial(_read, checkpoint / "model.safetensors"),
        f"{stock_class.__name__}.from_pretrained, same size": partial(stock_class.from_pretrained, folder),
        f"{own.__name__}.from_pretrained": partial(own.from_pretrained, checkpoint),
    }
    contestants = [Contestant(name, _ready(call), ours=name.startswith(own.__name__)) for name, call in calls.items()]
    return Race(f"checkpoints/{name}, in a warm process", contestants)


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, copied into memory."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _ready(call: Call) -> Callable[[], Call]:
    return lambda: call

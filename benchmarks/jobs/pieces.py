"""Pieces that omni keeps beside a simpler one: what each costs.

JPEG       `read_picture` decodes with TurboJPEG, because Pillow silently accepts most damaged files
Muon       the optimizer of most recipes; AdamW takes less time for a step
"""

from collections.abc import Iterator
from functools import partial
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from benchmarks import peers, pictures
from benchmarks.measure import Call, Contestant, Race
from omni.training.optimizer import make_optimizer
from omni.training.sections import Optimizer
from omni.vision.pictures import read_picture


def races(quick: bool) -> Iterator[Race]:
    """Reading a JPEG file of 640 x 480 pixels; a step of the optimizer on the encoder, without forward and backward."""
    file = BytesIO()
    pictures.photo(0, pictures.SIZES[0]).save(file, "JPEG", quality=85)
    data = file.getvalue()
    expected = np.asarray(_by_pillow(data)).astype(int)
    contestants = [
        Contestant("Pillow", lambda: partial(_by_pillow, data)),
        Contestant(
            "read_picture",
            lambda: partial(read_picture, data),
            ours=True,
            check=lambda found: float(np.abs(np.asarray(found) - expected).max()),
        ),
    ]
    yield Race("a JPEG file of 640x480", contestants, items=1, unit="file")
    contestants = [Contestant(name, partial(_step, name), ours=name == "muon") for name in ("adamw", "muon")]
    yield Race("a step of the optimizer, encoder, float32", contestants, items=1, unit="step")


def _by_pillow(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


def _step(name: str) -> Call:
    model = peers.omni().train()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer: torch.optim.Optimizer = make_optimizer(model, Optimizer.model_validate({"name": name, "lr": 1e-4}))
    return optimizer.step

"""Small encoders as folders of checkpoints, and folders of small pictures of many kinds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.registry import get_modality
from omni.vision.pictures import read_picture

SIZE = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"height": 16, "width": 16}


@pytest.fixture
def save_encoder(tmp_path: Path) -> Callable[..., Path]:
    """`save_encoder(model_type, seed=0)`: the folder of an encoder of pictures of 16 x 16 with its image processor."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        BitImageProcessorPil,
        CLIPImageProcessorPil,
        SiglipImageProcessorPil,
        ViTImageProcessorPil,
    )

    from omni import OmniImageProcessor

    def save(model_type: str = "omni_vision", seed: int = 0) -> Path:
        edge = {"size": {"shortest_edge": 20}, "crop_size": SQUARE}
        processor = {
            "omni_vision": lambda: OmniImageProcessor(size=SQUARE, image_mean=[0.4, 0.5, 0.6]),
            "clip_vision_model": lambda: CLIPImageProcessorPil(**edge),
            "siglip_vision_model": lambda: SiglipImageProcessorPil(size=SQUARE),
            "dinov2": lambda: BitImageProcessorPil(**edge),
            "vit": lambda: ViTImageProcessorPil(size=SQUARE),
        }[model_type]()
        torch.manual_seed(seed)
        own = {"mlp_ratio": 2} if model_type == "dinov2" else {"intermediate_size": 32}
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **SIZE, **own))
        folder = tmp_path / f"{model_type}_{seed}"
        for part in (model, processor):
            part.save_pretrained(folder)
        return folder

    return save


class Doubled:
    """A packed form of any encoder: the encoder itself in float64."""

    path = "doubled"

    def __init__(self, model: Any, processor: Any, dtype: Any) -> None:
        import copy

        self.model, self.processor = copy.deepcopy(model).double(), processor

    def read(self, source: Any, at_least: int | None = None) -> tuple[Any, tuple[int, int], str | None]:
        picture = read_picture(source, at_least)
        return picture, picture.size, None

    def prepare(self, picture: Any) -> np.ndarray:
        return self.processor(picture, return_tensors="np")["pixel_values"][0].astype(np.float64)

    def batch(self, prepared: Any) -> Any:
        import torch

        return torch.from_numpy(np.stack(prepared))

    def grid_shapes(self, batch: Any) -> list[tuple[int, ...]]:
        return [(self.model.config.grid_size,) * 2] * len(batch)

    def __call__(self, batch: Any, cls_only: bool = False) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(pixel_values=batch, cls_only=cls_only)


@pytest.fixture
def another_form() -> Callable[[pytest.MonkeyPatch], None]:
    """`another_form(monkeypatch)`: as on a machine whose packed form no other machine has."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(vars(get_modality("image")), "pack", Doubled)

    return change


@pytest.fixture
def make_pictures(tmp_path: Path) -> Callable[..., Path]:
    """`make_pictures(count, name="pictures")`: a folder with folders of pictures, formats and sizes in turn."""

    def make(count: int, name: str = "pictures") -> Path:
        random = np.random.default_rng(0)
        for number in range(count):
            height, width = random.integers(12, 60, 2)
            coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            picture = coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC)
            path = tmp_path / name / f"{number % 3}" / f"{number:05}{('.jpg', '.png', '.webp', '.JPEG')[number % 4]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        return tmp_path / name

    return make

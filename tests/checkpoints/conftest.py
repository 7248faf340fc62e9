"""Small models and their checkpoints, for tests that change a folder before it is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omni import OmniForConditionalGeneration, OmniVisionConfig, OmniVisionModel

VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def fused(make_model: Callable[..., Any]) -> OmniForConditionalGeneration:
    return make_model(text={"num_hidden_layers": 1})


@pytest.fixture(scope="module")
def encoder() -> OmniVisionModel:
    torch.manual_seed(0)
    return OmniVisionModel(OmniVisionConfig(**VISION, intermediate_size=32)).eval()


@pytest.fixture(scope="module")
def saved(fused: Any, encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the fused model and the encoder, each as one file and in shards."""
    folders = {}
    for name, model in (("fused", fused), ("encoder", encoder)):
        for kind, size in (("file", "1GB"), ("shards", "20KB")):
            folders[f"{name}-{kind}"] = tmp_path_factory.mktemp(f"{name}-{kind}")
            model.save_pretrained(folders[f"{name}-{kind}"], max_shard_size=size)
    return folders

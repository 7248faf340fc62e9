"""What the tests of training share: models that train in milliseconds."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni import (
    OmniAudioConfig,
    OmniAudioModel,
    OmniFeatureExtractor,
    OmniImageProcessor,
    OmniVisionConfig,
    OmniVisionModel,
)
from omni.scenes import corpus, voices
from omni.scenes.recipe import Scenes
from omni.training.fused import build_omni
from omni.training.recipe import Recipe

CONFIGS = Path(__file__).parents[2] / "configs"


def two_steps(name: str, checkpoint: Path, output: Path, data: Path, **changes: Any) -> Recipe:
    """Two steps of a shipped recipe from a checkpoint, on data of one's own."""
    settings: dict[str, Any] = json.loads((CONFIGS / f"train_{name}.json").read_text())
    settings |= {"model": {"checkpoint": str(checkpoint)}, "train": {"path": str(data)}, "evaluate": None}
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "use_cpu": True,
        "report_to": "none",
    }
    return Recipe.model_validate(settings | {"arguments": arguments, "output": str(output)} | changes)


@pytest.fixture(scope="session", autouse=True)
def _drawn_once() -> Iterator[None]:
    """What a tokenizer learns from is the same for all recipes of scenes: the questions about 4,000 scenes, drawn once."""
    draw = Scenes.texts
    texts = cache(lambda: [*draw(None)])  # type: ignore[arg-type]  # if a recipe matters to it, this fails
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scenes, "texts", lambda recipe: iter(texts()))
        yield


@pytest.fixture(scope="session")
def tiny_encoder() -> dict[str, Any]:
    """Settings of an encoder; its dropout is that of a new encoder."""
    return {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="session")
def tiny_thinker() -> dict[str, Any]:
    """Configuration of a language model."""
    return {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "tie_word_embeddings": True,
    }


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: dict[str, Any], tiny_thinker: dict[str, Any]) -> Path:
    """A folder with `encoder`, `hearing` (for sounds), `thinker.json`, and `omni`, a fused model with nothing
    learnt, and `omni_hearing`, the same with ears."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    OmniVisionModel(OmniVisionConfig(**tiny_encoder)).save_pretrained(folder / "encoder")
    OmniImageProcessor().save_pretrained(folder / "encoder")
    OmniAudioModel(OmniAudioConfig(**tiny_encoder)).save_pretrained(folder / "hearing")
    OmniFeatureExtractor(mean=-4.5).save_pretrained(folder / "hearing")
    (folder / "thinker.json").write_text(json.dumps(tiny_thinker))
    image = {"encoder": str(folder / "encoder"), "output": "cls+grid", "projector": "unshuffle_mlp", "factor": 2}
    model, processor = build_omni(thinker=str(folder / "thinker.json"), vocab_size=400, image=image)
    model.save_pretrained(folder / "omni")
    processor.save_pretrained(folder / "omni")
    audio = {"encoder": str(folder / "hearing"), "output": "grid", "projector": "unshuffle_mlp", "factor": 2}
    model, processor = build_omni(checkpoint=str(folder / "omni"), modalities={"audio": audio})
    model.save_pretrained(folder / "omni_hearing")
    processor.save_pretrained(folder / "omni_hearing")
    return folder


def hum(text: str, voice: str, rng: object) -> tuple[np.ndarray, int]:
    """Stands for a synthesizer: a tone for each letter."""
    t = np.arange(2000) / 16_000
    return np.concatenate([np.sin(2 * np.pi * (200 + 90 * (ord(each) % 32)) * t) for each in text.lower()]), 16_000


@pytest.fixture(scope="session")
def hummed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of hummed sayings."""
    folder = tmp_path_factory.mktemp("voices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(voices._SPEAK, "flite", hum)
        corpus.make(folder, "flite", 40, "train", "seen")
        for group in ("seen", "held_out"):
            corpus.make(folder, "flite", 8, "test", group)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures in folders named by their answer."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(16):
        folder = root / ("dark", "bright")[number % 2]
        folder.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 60, (40, 30, 3))
        Image.fromarray((noise + 150 * (number % 2)).astype(np.uint8)).save(folder / f"{number}.png")
    return root

"""torch's defaults are the user's to change; what is compiled says the same under all of them."""

import json
from collections.abc import Callable
from typing import Any

import pytest

SCRIPT = """
import json
import os
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModel
from transformers.cache_utils import DynamicCache
from omni import (
    OmniAudioConfig, OmniAudioModel, OmniFeatureExtractor, OmniImageProcessor, OmniVisionConfig, OmniVisionModel
)
from omni.audio.sound import Sound
from omni.fast.cache import give_room
from omni.fast.generation import _KNOWN, quick_step, stepping
from omni.fast.packed_sounds import PackedAudioModel
from omni.fast.packing import PackedVisionModel
from omni.fast.resizing import resize

torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
thinker = AutoModel.from_config(AutoConfig.for_model("llama", **shape)).eval()
encoder, processor = OmniVisionModel(OmniVisionConfig(image_size=64)).eval(), OmniImageProcessor()
hidden, bytes_ = torch.randn(2, 60, 64), torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8)
hearing, features = OmniAudioModel(OmniAudioConfig(num_hidden_layers=2)).eval(), [torch.randn(n, 80) for n in (1, 70, 333)]
sound = Sound(np.random.default_rng(0).uniform(-0.5, 0.5, 5000).astype(np.float32), 16_000)
pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 4), dtype=np.uint8)

@torch.no_grad()
def results():
    _KNOWN.clear()
    cache = give_room(DynamicCache(config=thinker.config))
    with stepping(thinker):
        step = quick_step(thinker, cache, hidden, None, {})
        assert step is not None
        yield from (step(part, None, None, cache) for part in hidden.split([50, 9, 1], dim=1))
    for dtype in (torch.float32, torch.bfloat16):
        packed = PackedVisionModel(encoder, processor, dtype)
        for cls_only in (False, True):
            yield packed(bytes_, cls_only=cls_only).last_hidden_state.float()
        packed = PackedAudioModel(hearing, OmniFeatureExtractor(), dtype)
        for cls_only in (False, True):
            yield packed(features, cls_only=cls_only).last_hidden_state.float()
        yield packed.prepare(sound)
    yield resize(pixels, 33, 44, 2)

expected = [result.tolist() for result in results()]
statuses = {}
for setting in sys.argv[1:]:  # each in a process of its own, which ends where memory is too small
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        exec(setting)
        os._exit(0 if [result.tolist() for result in results()] == expected else 3)
    statuses[setting] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(statuses))
"""

SETTINGS = {
    "bfloat16": "torch.set_default_dtype(torch.bfloat16)",
    "float16": "torch.set_default_dtype(torch.float16)",
    "float64": "torch.set_default_dtype(torch.float64)",
    "another device": "torch.set_default_device('meta')",
    "memory filled with NaN": "torch.use_deterministic_algorithms(True)",
}


@pytest.fixture(scope="module")
def statuses(python: Callable[..., Any]) -> dict[str, int]:
    run = python("-c", SCRIPT, *SETTINGS.values())
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, int] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_compiled_says_the_same(setting: str, statuses: dict[str, int]) -> None:
    """A status below zero is the signal that ended the process; 3 is another result."""
    assert statuses[SETTINGS[setting]] == 0

"""Speed is where it may enter, whatever is imported first, and takes nothing over but what it knows."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaModel

from omni import OmniForConditionalGeneration, OmniImageProcessor, OmniVisionConfig, OmniVisionModel
from omni.embedding.engine import Engine
from omni.fast import attention
from omni.fast.acceleration import FastAcceleration
from omni.fast.install import pack_pictures
from omni.fast.packing import PackedVisionModel
from omni.fusion import acceleration
from omni.fusion.thinker import readable_mask
from omni.loading.encoder import Encoder, load_encoder
from omni.registry import get_modality

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints"
MODULES = [
    "omni.fast.acceleration",
    "omni.fast.packing",
    "omni.vision.plugin",
    "omni.fusion.modeling_omni",
    "omni.session",
]


def test_speed_is_there_whatever_is_imported_first(python: Callable[..., Any]) -> None:
    code = """
import importlib, sys
for name in {modules}:
    for known in [known for known in sys.modules if known == "omni" or known.startswith("omni.")]:
        del sys.modules[known]
    importlib.import_module(name)
    from omni.fusion import acceleration
    from omni.registry import get_modality
    assert type(acceleration.current()).__name__ == "FastAcceleration", name
    assert get_modality("image").pack.__module__ == "omni.fast.install", name
"""
    run = python("-c", code.format(modules=MODULES))
    assert run.returncode == 0, run.stderr


def test_naming_the_plugin_and_its_packed_form_imports_no_torch() -> None:
    code = (
        "import sys; from omni.registry import get_modality; get_modality('image').pack; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# --- The packed form --------------------------------------------------------------------------------------------------


def test_an_engine_takes_it(compiles: bool) -> None:
    engine = Engine(load_encoder(SHIPPED / "vision_tiny"))
    assert engine.path == ("compiled" if compiles else "packed")
    assert engine.prepare(Image.new("RGB", (30, 50))).dtype == np.uint8
    assert 0 < engine.error < 1e-5


def hooked(model: Any) -> Any:
    model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    return model


def cut(model: Any) -> Any:
    model.layers[1].mlp.fc1, model.layers[1].mlp.fc2 = nn.Linear(32, 24), nn.Linear(24, 32)
    return model


def replaced(model: Any) -> Any:
    model.layers[1].mlp.fc1 = nn.utils.parametrizations.weight_norm(model.layers[1].mlp.fc1)
    return model


def derived(model: Any) -> Any:
    model.__class__ = type("Derived", (OmniVisionModel,), {})
    return model


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a hook": (hooked, {}),
    "a layer that was cut": (cut, {}),
    "weights that are computed": (replaced, {}),
    "a class of one's own": (derived, {}),
    "another device": (lambda model: model.to("meta"), {}),
    "pictures that are not scaled": (lambda model: model, {"do_resize": False}),
    "pictures of another size": (lambda model: model, {"size": {"height": 32, "width": 16}}),
    "pictures by their shortest edge": (lambda model: model, {"size": {"shortest_edge": 16}}),
    "pictures that are cropped": (lambda model: model, {"do_center_crop": True, "crop_size": 16}),
}


def encoder() -> OmniVisionModel:
    torch.manual_seed(0)
    settings = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return OmniVisionModel(OmniVisionConfig(**settings)).eval()


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_known_is_not_packed(other: str) -> None:
    change, settings = OTHERS[other]
    size = {"size": {"height": 16, "width": 16}}
    assert isinstance(pack_pictures(encoder(), OmniImageProcessor(**size), torch.float32), PackedVisionModel)
    assert pack_pictures(change(encoder()), OmniImageProcessor(**size | settings), torch.float32) is None


def test_pictures_that_are_cropped_are_embedded_as_they_are() -> None:
    processor = OmniImageProcessor(size={"shortest_edge": 16}, do_center_crop=True, crop_size=16)
    engine, picture = Engine(Encoder(encoder(), processor)), Image.effect_noise((40, 30), 90).convert("RGB")
    assert engine.path == "as it is"
    expected = engine.encoder.encode(engine.encoder.prepare([picture]))["cls"]
    np.testing.assert_allclose(engine([engine.prepare(picture)]), expected, rtol=1e-5, atol=1e-6)


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "chosen", "expected"),
    [
        ("cpu", torch.bfloat16, "sdpa", "eager"),
        ("cpu", torch.float32, "sdpa", "sdpa"),
        ("cuda", torch.bfloat16, "sdpa", "sdpa"),
        ("cpu", torch.bfloat16, "flex_attention", "flex_attention"),
    ],
)
def test_attention_is_written_out_where_that_learns_faster(
    device: str, dtype: torch.dtype, chosen: str, expected: str, make_model: Any
) -> None:
    model: OmniForConditionalGeneration = make_model("qwen3", "omni_vision")
    model.model.image_tower.config._attn_implementation = chosen
    with acceleration.current().training(model, torch.device(device), dtype):
        assert model.model.image_tower.config._attn_implementation == expected
        assert all(layer.attention.config._attn_implementation == expected for layer in model.model.image_tower.layers)
        assert model.model.language_model.config._attn_implementation == "sdpa"
        assert "eager" not in model.config.to_json_string()
    assert model.model.image_tower.config._attn_implementation == chosen


def small_llama(dtype: torch.dtype = torch.bfloat16) -> LlamaModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaModel(LlamaConfig(**sizes, **heads)).to(dtype).requires_grad_(False)


@pytest.mark.parametrize(
    ("dtype", "chosen", "expected"),
    [
        (torch.bfloat16, "sdpa", attention.NAME),
        (torch.float32, "sdpa", "sdpa"),
        (torch.bfloat16, "eager", "eager"),
    ],
)
def test_a_language_model_that_is_frozen_in_bfloat16_attends_by_products(
    dtype: torch.dtype, chosen: str, expected: str
) -> None:
    model = small_llama(dtype)
    model.set_attn_implementation(chosen)
    step = model, torch.device("cpu"), torch.float32
    with acceleration.using(acceleration.Acceleration()), acceleration.current().training(*step):
        assert model.config._attn_implementation == chosen
    with acceleration.current().training(*step):
        assert model.config._attn_implementation == expected
    assert model.config._attn_implementation == chosen


@pytest.mark.parametrize("shape", ["branches", "padding on the left"])
def test_attention_by_products_has_the_gradient_of_the_reference(shape: str) -> None:
    """In float32, for a sequence with two branches and one that is shorter."""
    model, length = small_llama(torch.float32), 12
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    if shape == "branches":
        mask[0, :, 9:, 6:9] = False
        mask[1, :, :, 8:] = False
        mask[1, :, range(8, 12), range(8, 12)] = True
    else:
        mask[1, :, 3:, :3] = False
    embedded, wanted = torch.randn(2, length, 96), torch.randn(2, length, 96)
    found = {}
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation(name)
        hidden = embedded.clone().requires_grad_()
        read = readable_mask(mask, model.config, torch.float32)
        output = model(inputs_embeds=hidden, attention_mask=read).last_hidden_state
        (output * wanted).sum().backward()
        found[name] = output.detach(), hidden.grad
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("sdpa")
    text = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 1]])
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    first = model(text, attention_mask=padded).last_hidden_state
    model.set_attn_implementation(attention.NAME)
    torch.testing.assert_close(
        model(text, attention_mask=padded).last_hidden_state[padded.bool()], first[padded.bool()]
    )


# --- The seam ---------------------------------------------------------------------------------------------------------


def test_the_reference_can_be_asked_for() -> None:
    assert isinstance(acceleration.current(), FastAcceleration)
    with acceleration.using(acceleration.Acceleration()):
        assert type(acceleration.current()) is acceleration.Acceleration
    assert isinstance(acceleration.current(), FastAcceleration)
    assert get_modality("image").pack is pack_pictures

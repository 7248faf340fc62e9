"""What is quantized of a fused model, and that its tokens stay numbers where a projector is."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BitsAndBytesConfig, QuantoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from omni import OmniForConditionalGeneration
from omni.fusion.quantization import spare_small_parts
from omni.loading.encoder import Encoder

Make = Callable[..., OmniForConditionalGeneration]
ROOT = Path(__file__).parents[2]


def quantized_parts(model: nn.Module, quantization: Any) -> set[str]:
    """The parts of which transformers would quantize linear layers; all of a part's or none."""
    spared = getattr(quantization, "llm_int8_skip_modules", None) or quantization.modules_to_not_convert
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    converted = {name for name in linear if should_convert_module(name, spared)}
    parts = {name.removeprefix("model.").split(".")[0] for name in converted}
    assert converted == {name for name in linear if name.removeprefix("model.").split(".")[0] in parts}
    return parts


@pytest.mark.parametrize("base", [False, True], ids=["with head", "base model"])
@pytest.mark.parametrize(
    ("kind", "key"),
    [(BitsAndBytesConfig, "llm_int8_skip_modules"), (QuantoConfig, "modules_to_not_convert")],
    ids=["bitsandbytes", "quanto"],
)
def test_the_thinker_is_quantized_and_what_is_small_is_not(make_model: Make, kind: Any, key: str, base: bool) -> None:
    model: Any = make_model(token_id=3)
    model = model.model if base else model
    given = kind(load_in_8bit=True) if kind is BitsAndBytesConfig else kind(weights="int8")
    assert quantized_parts(model, spare_small_parts(given)) == {"language_model"}
    assert getattr(given, key) is None  # the caller's own
    assert quantized_parts(model, spare_small_parts(given.to_dict())) == {"language_model"}
    for names, expected in [
        ([], {"image_tower", "image_projector", "language_model"}),
        (["image_projector"], {"image_tower", "language_model"}),
        (["image_tower", "language_model"], {"image_projector"}),
        (["image_tower", "q_proj"], None),
    ]:
        setattr(given, key, names)
        spared = spare_small_parts(given)
        if expected is not None:
            assert quantized_parts(model, spared) == expected
        assert {*names, "lm_head"} <= {*getattr(spared, key)}
        assert getattr(given, key) == names


class Integers(nn.Module):
    """A linear layer whose weight is integers, as in bitsandbytes."""

    def __init__(self, linear: nn.Linear, bias: bool) -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max() / 127)
        rounded = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.bias = linear.bias if bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert inputs.is_floating_point()
        return F.linear(inputs, self.weight.to(inputs.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("projector", ["linear", "mlp", "unshuffle_mlp"])
def test_tokens_are_no_integers_where_a_projector_is(make_model: Make, projector: str, bias: bool) -> None:
    model = make_model(projector=projector, factor=2 if projector == "unshuffle_mlp" else 1, token_id=3)
    layers = [name for name, child in model.model.image_projector.named_children() if isinstance(child, nn.Linear)]
    for name in layers if not bias else ():
        nn.init.zeros_(getattr(model.model.image_projector, name).bias)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    quantized = copy.deepcopy(model)
    for name in layers:
        setattr(quantized.model.image_projector, name, Integers(getattr(model.model.image_projector, name), bias))
    with torch.inference_mode():
        expected = torch.stack(list(model.get_image_features(pixels).pooler_output))
        raw = torch.stack(list(quantized.get_image_features(pixels).pooler_output))
        items = quantized.model.encode_items("image", pixel_values=pixels)
        encoded = torch.stack(quantized.model.project("image", items))
        named = Encoder(quantized.model.image_tower, None, fused=quantized.model).encode({"pixel_values": pixels})[
            "projected"
        ]
    for found in (raw, encoded, named):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.long
@pytest.mark.parametrize("spared", [None, ["image_projector"], []], ids=str)
@pytest.mark.parametrize("package", ["bitsandbytes", "optimum.quanto", "torchao"])
def test_a_quantized_checkpoint_answers(package: str, spared: list[str] | None) -> None:
    """With the packages themselves, where they are installed."""
    from PIL import Image

    from omni.loading.checkpoint import load
    from omni.questions import make_prompts

    pytest.importorskip(package)
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        quantization: Any = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=spared)
    elif package == "bitsandbytes":
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=spared)
    else:
        quantization = QuantoConfig(weights="int8", modules_to_not_convert=spared)
    folder = ROOT / "checkpoints" / "omni_tiny"
    model, processor = load(folder)
    quantized = OmniForConditionalGeneration.from_pretrained(folder, quantization_config=quantization)
    inputs = make_prompts(processor, [("what color is the circle", [Image.open(ROOT / "examples" / "scene.png")])])
    tokens, expected = (
        torch.cat(list(each.get_image_features(inputs["pixel_values"]).pooler_output)) for each in (quantized, model)
    )
    error = float((tokens - expected).norm() / expected.norm())
    assert error == 0 if spared is None else 0 < error < 0.05
    answers = [each.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist() for each in (quantized, model)]
    assert answers[0] == answers[1]

"""The peers are what they are said to be: of the same shape, with the same weights, on their fast paths."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ceiling, peers, pictures
from benchmarks.jobs import encoder, sounds
from benchmarks.machine import CPU
from benchmarks.measure import Unavailable
from omni.fusion.configuration_omni import OmniConfig
from omni.vision.configuration_vision import OmniVisionConfig
from omni.vision.modeling_vision import OmniVisionModel

HAS_TIMM = find_spec("timm") is not None
OTHER = {"image_size": 24, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def model() -> OmniVisionModel:
    """Of another shape than the shipped one, and no weight at zero or one, where a mistake would not show."""
    model = OmniVisionModel(OmniVisionConfig(**OTHER, intermediate_size=48))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.fixture(
    params=["transformers ViT", pytest.param("timm", marks=pytest.mark.skipif(not HAS_TIMM, reason="no timm"))]
)
def make(request: pytest.FixtureRequest) -> Callable[[OmniVisionModel], nn.Module]:
    return peers.ENCODERS[request.param]


@torch.inference_mode()
def test_the_seed_module_is_the_same_function_with_the_same_weights(model: OmniVisionModel) -> None:
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    expected, found = model(pixels), peers.seed(model)(pixels)
    torch.testing.assert_close(found[:, :1], expected.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 1:], expected.grid, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_seed_module_is_the_same_function_with_the_shipped_weights_on_pictures() -> None:
    model, pixels = peers.omni(), pictures.pixels(2)
    assert count(peers.seed(model)) == count(model) == 916_992
    torch.testing.assert_close(peers.seed(model)(pixels), peers.tokens(model(pixels)), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("onnxruntime", peers.onnxruntime),
        ("openvino", partial(peers.openvino, requests=1)),
        ("openvino", partial(peers.openvino, requests=2)),
    ],
    ids=["onnxruntime", "OpenVINO", "OpenVINO, 2 requests"],
)
@torch.inference_mode()
def test_runtimes_say_the_same_of_pictures(module: str, make: Callable[..., Callable[..., torch.Tensor]]) -> None:
    pytest.importorskip(module, reason=f"{module} is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("transformers", minversion="5.23")
    pixels = pictures.pixels(3)
    expected = peers.tokens(peers.omni()(pixels))
    torch.testing.assert_close(make(torch.float32)(pixels), expected, rtol=0, atol=1e-4)


def test_the_seed_module_takes_the_fused_kernel() -> None:
    module = peers.seed(peers.omni())
    with torch.inference_mode(), torch.profiler.profile() as profile:
        module(pictures.pixels(1))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_transformer_encoder_layer_fwd"] == 4


def test_the_seed_module_gets_gradients_in_training(model: OmniVisionModel) -> None:
    module = peers.seed(model.train())
    assert module.training
    module(torch.randn(2, 3, 24, 24)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_others_have_one_bias_more(make: Callable[[OmniVisionModel], nn.Module]) -> None:
    """Their final norm is a LayerNorm."""
    model = peers.omni()
    assert count(make(model)) == count(model) + 128


@torch.inference_mode()
def test_the_others_differ_in_the_final_norm_alone(
    make: Callable[[OmniVisionModel], nn.Module], model: OmniVisionModel
) -> None:
    peer, pixels = make(model), torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    expected = peers.tokens(model(pixels))
    assert peers.tokens(peer(pixels)).shape == expected.shape == (2, 10, 32)
    assert not torch.allclose(peers.tokens(peer(pixels)), expected, atol=1e-2)
    (name,) = (name for name, module in peer.named_children() if isinstance(module, nn.LayerNorm))
    setattr(peer, name, model.norm)
    torch.testing.assert_close(peers.tokens(peer(pixels)), expected, rtol=0, atol=1e-5)


def test_peers_have_the_precision_and_mode_of_what_they_are_made_from(
    make: Callable[[OmniVisionModel], nn.Module],
) -> None:
    peer = make(peers.omni(torch.bfloat16).train())
    assert {parameter.dtype for parameter in peer.parameters()} == {torch.bfloat16}
    assert peer.training


@pytest.mark.skipif(HAS_TIMM, reason="timm is there")
def test_without_timm_there_is_a_reason() -> None:
    with pytest.raises(Unavailable, match="timm is not installed"):
        peers.timm(peers.omni())


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_the_stand_in_for_torchvision_leaves_nothing_behind() -> None:
    with peers._torchvision():
        functional = import_module("torchvision.transforms.functional")
        names = {functional.InterpolationMode.NEAREST: "nearest", functional.InterpolationMode.BICUBIC: "bicubic"}
        assert len(names) == 2
    assert not [name for name in sys.modules if name.startswith("torchvision")]
    assert find_spec("torchvision") is None


@pytest.mark.parametrize(("own_encoder", "expected"), [(False, 50), (True, 196)])
def test_llava_has_the_same_thinker_and_as_many_picture_tokens_as_is_said(own_encoder: bool, expected: int) -> None:
    config = OmniConfig.from_pretrained(peers.CHECKPOINTS / "omni_tiny")
    llava = peers.llava(config, own_encoder)
    with torch.inference_mode():
        (tokens,) = llava.get_image_features(pictures.pixels(1)).pooler_output
    assert tokens.shape == (expected, config.text_config.hidden_size)
    assert llava.config.text_config.to_dict() == config.text_config.to_dict()
    assert llava.lm_head.weight is llava.get_input_embeddings().weight


@pytest.mark.parametrize("device", ["cpu", "meta"])  # the second one stands for a GPU
def test_the_ceiling_counts_every_product_of_the_encoder_once(device: str) -> None:
    model = peers.omni(attn_implementation="eager")  # written out, so that all of it is seen
    with FlopCounterMode(display=False) as counter:
        model(pictures.pixels(2))
    products = ceiling.products(ceiling.vision(model.config), 2, torch.float32, torch.device(device))
    counted = {
        contestant.part: contestant.part.times * contestant.part.flops for contestant in products if contestant.part
    }
    assert sum(counted.values()) == counter.get_total_flops()
    for contestant in products:
        contestant.build()()


def test_the_ceiling_of_sounds_counts_every_product_once() -> None:
    features = sounds._batch(2)
    model = sounds.omni()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(features)
    products = ceiling.products(ceiling.audio(model.config, features.shape[1]), 2, torch.float32)
    counted = {each.part: each.part.times * each.part.flops for each in products if each.part}
    assert sum(counted.values()) == counter.get_total_flops()


def test_the_peer_of_sounds_computes_the_same() -> None:
    features, model = sounds._batch(2), sounds.omni()
    with torch.inference_mode():
        torch.testing.assert_close(sounds.plain(model)(features), model(features).last_hidden_state)


def test_an_encoder_that_is_off_is_found_out() -> None:
    with torch.inference_mode():
        right = peers.tokens(peers.omni()(pictures.pixels(2)))
    assert encoder._check(2, 1e-4, right[:, :1]) < 1e-5
    for wrong in (right + 1e-3, right * float("nan")):
        with pytest.raises(ValueError, match="off by"):
            encoder._check(2, 1e-4, wrong)


def test_every_picture_of_a_batch_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DRAWN", 2)
    with torch.inference_mode():
        right = peers.tokens(peers.omni()(pictures.batch(4, CPU)))
    right = right.clone()  # now it may be changed
    assert encoder._check(4, 1e-4, right) < 1e-5
    right[3, 7] += 1e-3
    with pytest.raises(ValueError, match="off by"):
        encoder._check(4, 1e-4, right)

"""The packed encoder against the model itself: compiled and not, every way in and out, other shapes, no oneDNN."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni.fast.packed_blocks import attend
from omni.fast.packing import PackedVisionModel
from omni.vision.configuration_vision import OmniVisionConfig
from omni.vision.image_processing_vision import OmniImageProcessor
from omni.vision.modeling_vision import OmniVisionModel

WAYS = ["compiled", "oneDNN", "neither"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How products are computed."""
    if request.param == "compiled" and not compiles:
        pytest.skip("there is no C++ compiler here, or a processor that compiled_encoder.cpp is not for")
    if request.param != "compiled":
        monkeypatch.setattr("omni.fast.packing.is_possible", lambda config, dtype: False)
    with torch.backends.mkldnn.flags(enabled=request.param != "neither"):
        yield request.param


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, another for every channel


def processor(channels: int = 3) -> OmniImageProcessor:
    return OmniImageProcessor(image_mean=MEAN[:channels], image_std=STD[:channels])


def make_model(**settings: Any) -> OmniVisionModel:
    """Random in every parameter: zeros and ones would hide an order mixed up or a bias forgotten."""
    torch.manual_seed(0)
    model = OmniVisionModel(OmniVisionConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.08 if parameter.ndim > 1 else 0.3) + ("norm" in name))
    return model


def make_bytes(model: OmniVisionModel, count: int) -> torch.Tensor:
    side, channels = model.config.image_size, model.config.num_channels
    random = np.random.default_rng(count)
    return torch.from_numpy(random.integers(0, 256, (count, side, side, channels), dtype=np.uint8))


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """In float64, by the definition."""
    mean, std = (torch.tensor(values[: pictures.shape[-1]]).double() for values in (MEAN, STD))
    return ((pictures.double() / 255 - mean) / std).permute(0, 3, 1, 2).float()


SHAPES = {
    "the seed's": {},
    "three heads of 32, 26 tokens": {"image_size": 40, "patch_size": 8, "hidden_size": 96, "num_attention_heads": 3},
    "one head, 5 tokens, one block": {
        "image_size": 32,
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
    },
    "patches of 14": {"image_size": 56, "patch_size": 14, "num_hidden_layers": 2},  # 588 pixels, in no whole panels
    "grey, a wide MLP": {"image_size": 64, "num_channels": 1, "intermediate_size": 992, "num_hidden_layers": 2},
    "narrow": {"image_size": 48, "patch_size": 8, "hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 3},
    "one block, tanh": {"image_size": 32, "num_hidden_layers": 1, "hidden_act": "gelu_pytorch_tanh"},
    "an activation that oneDNN does not fuse": {"image_size": 32, "num_hidden_layers": 2, "hidden_act": "silu"},
    "relu, other eps": {"image_size": 32, "hidden_act": "relu", "layer_norm_eps": 0.1, "rms_norm_eps": 0.2},
}


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES.keys())
def test_packed_equals_the_model(settings: dict[str, Any], way: str) -> None:
    model = make_model(**settings)
    pictures, channels = make_bytes(model, 5), model.config.num_channels
    pixel_values = normalise(pictures)
    with torch.no_grad():
        expected = model(pixel_values)
    packed = PackedVisionModel(model, processor(channels), at_once=2)  # 5 pictures: two calls and a rest
    panel = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16  # two vectors
    whole_panels = all(size % panel == 0 for size in (model.config.hidden_size, model.config.head_dim))
    assert (packed.path == "compiled") == (way == "compiled" and whole_panels and model.config.hidden_act == "gelu")
    for given in (pixel_values, pictures):
        found = packed(given)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(found.grid, expected.grid, rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=3e-5)
        alone = packed(given, cls_only=True)
        assert alone.grid is None
        torch.testing.assert_close(alone.cls, expected.cls, rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(alone.last_hidden_state, expected.cls, rtol=1e-4, atol=3e-5)


def test_a_picture_has_the_same_tokens_in_every_batch_and_on_every_number_of_threads(compiles: bool) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    model, before = make_model(image_size=96), torch.get_num_threads()
    pictures = make_bytes(model, 7)
    packed = PackedVisionModel(model, processor())
    found = []
    for threads in (1, 2, 3, 4):  # each takes pictures of its own, and all share what is left: none, 1, 1, 3
        torch.set_num_threads(threads)
        try:
            found += [
                packed(pictures).last_hidden_state,
                torch.cat([packed(some).last_hidden_state for some in pictures.split(2)]),
                torch.cat([packed(p[None]).last_hidden_state for p in pictures]),
            ]
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_it_and_torch_do_not_disturb_each_other() -> None:
    """Both may use the processor's matrix units, each with settings of its own."""
    model = make_model(image_size=64)
    packed = PackedVisionModel(model, processor(), torch.bfloat16)
    pictures, linear = make_bytes(model, 3), torch.nn.Linear(96, 72).bfloat16()
    rows = torch.randn(50, 96).bfloat16()
    with torch.inference_mode():
        alone = packed(pictures).last_hidden_state, linear(rows), linear(rows[:5])
        for _ in range(3):
            assert torch.equal(linear(rows), alone[1])
            assert torch.equal(packed(pictures).last_hidden_state, alone[0])
            assert torch.equal(linear(rows[:5]), alone[2])


def test_large_scores_and_values_that_are_no_numbers_stay_what_they_are(way: str) -> None:
    """Weights that make attention look at one patch alone; then one pixel of one picture that is infinite."""
    model = make_model(image_size=64)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.qkv.weight[:256] *= 6
        pixel_values = normalise(make_bytes(model, 3))
        expected = model(pixel_values).last_hidden_state
        packed = PackedVisionModel(model, processor())
        torch.testing.assert_close(packed(pixel_values).last_hidden_state, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(packed(pixel_values, cls_only=True).cls, expected[:, :1], rtol=2e-3, atol=2e-3)
        pixel_values[1, 0, 5, 5] = float("nan")
        found = packed(pixel_values).last_hidden_state
        assert found[1].isnan().all()
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("given", [lambda pictures: pictures, normalise], ids=["bytes", "pixels"])
@pytest.mark.parametrize("shape", ["the seed's", "three heads of 32, 26 tokens", "patches of 14", "grey, a wide MLP"])
def test_bfloat16_is_as_near_as_the_model_in_bfloat16(shape: str, given: Callable[..., torch.Tensor], way: str) -> None:
    model = make_model(**SHAPES[shape])
    pictures, channels = make_bytes(model, 4), model.config.num_channels
    pixel_values = normalise(pictures)
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state
        half = make_model(**SHAPES[shape]).bfloat16()(pixel_values.bfloat16()).last_hidden_state.float()
    packed = PackedVisionModel(model, processor(channels), torch.bfloat16, at_once=3)
    for cls_only in (False, True):
        found = packed(given(pictures), cls_only).last_hidden_state
        assert found.dtype == torch.bfloat16
        rows = slice(0, 1 if cls_only else None)
        error, usual = (
            (one.float() - expected[:, rows]).norm() / expected[:, rows].norm() for one in (found, half[:, rows])
        )
        assert 1e-4 < error < 2 * usual  # not float32 by accident, and no second source of error


@pytest.mark.parametrize(("largest", "usual"), [(0.0, False), (10.0, False), (90.0, False), (150.0, True), (1e4, True)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_attention_by_powers_of_two_is_softmax_for_scores_of_any_size(
    largest: float, usual: bool, sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every score of one row near its largest, of either sign: 2^150 is more than a bfloat16 holds, 2^-150 is less."""
    heads, n, depth = 2, 9, 4
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, n, heads, depth)
    query[..., 0], key[..., 0] = sign * largest, 1 + 0.01 * torch.rand(2, n, heads)
    qkv = torch.cat([part.flatten(2) for part in (query, key, value)], dim=-1).bfloat16()
    asked: list[int] = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda scores, axis: asked.append(axis) or softmax(scores, axis))
    found = attend(qkv, heads)
    assert bool(asked) is usual
    exact = [part.double().view(2, n, heads, depth).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]
    powers = (exact[0] @ exact[1].mT).bfloat16().double() * math.log(
        2
    )  # scores are rounded, as by any bfloat16 product
    expected = (softmax(powers, -1) @ exact[2]).transpose(1, 2).flatten(2)
    assert (found.double() - expected).abs().max() < 0.03


def test_attention_of_nan_is_nan() -> None:
    qkv = torch.randn(1, 5, 24).bfloat16()
    qkv[0, 2, 0] = float("nan")
    assert attend(qkv, 2).isnan().any()


def test_bytes_give_what_the_image_processor_gives() -> None:
    model = make_model(num_hidden_layers=2)
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)) for side in (80, 300)]
    for makes in (OmniImageProcessor(), OmniImageProcessor(do_normalize=False), OmniImageProcessor(image_mean=0.3)):
        packed = PackedVisionModel(model, makes)
        found = packed(torch.from_numpy(np.stack([packed.prepare(picture) for picture in pictures])))
        with torch.no_grad():
            expected = model(makes(pictures, return_tensors="pt")["pixel_values"])
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=3e-5)


def test_what_becomes_of_the_model_changes_nothing() -> None:
    model = make_model(image_size=32)
    pictures = make_bytes(model, 2)
    packed = PackedVisionModel(model, processor())
    before = packed(pictures).last_hidden_state.clone(), packed(pictures, cls_only=True).cls.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(packed(pictures).last_hidden_state, before[0])
    assert torch.equal(packed(pictures, cls_only=True).cls, before[1])


def test_pictures_in_any_order_of_memory_and_of_any_precision_are_read(way: str) -> None:
    model = make_model(image_size=32)
    packed, pictures = PackedVisionModel(model, processor()), make_bytes(model, 3)
    expected, pixel_values = packed(pictures).last_hidden_state, normalise(pictures)
    for given in (
        pictures.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        pictures.repeat_interleave(2, dim=1)[:, ::2],
        pixel_values.contiguous(memory_format=torch.channels_last),
        pixel_values.double(),
        torch._neg_view(-pixel_values),
    ):
        torch.testing.assert_close(packed(given).last_hidden_state, expected, rtol=1e-4, atol=3e-5)


def test_the_number_of_threads_may_change_between_two_calls(compiles: bool) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    model, before = make_model(image_size=32), torch.get_num_threads()
    packed, pictures = PackedVisionModel(model, processor()), make_bytes(model, 9)
    expected = packed(pictures).last_hidden_state
    try:
        for threads in (1, 6, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(packed(pictures).last_hidden_state, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "change",
    [
        lambda pictures: pictures.to("meta"),
        lambda pictures: pictures.to_sparse(),
        lambda pictures: pictures.to(torch.int64),
        lambda pictures: pictures.to(torch.int8),
        lambda pictures: pictures.bool(),
        lambda pictures: pictures.to(torch.complex64),
    ],
)
def test_pictures_elsewhere_or_of_other_types_are_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = make_model(image_size=32)
    with pytest.raises(
        ValueError, match="Expected a dense tensor of bytes or of floating point numbers on the CPU, found"
    ):
        PackedVisionModel(model, processor())(change(make_bytes(model, 2)))


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 32, 33, 3), (32, 32, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    packed = PackedVisionModel(make_model(image_size=32), processor())
    with pytest.raises(ValueError, match=r"Expected torch.uint8 pictures of shape \(32, 32, 3\), found"):
        packed(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\)"):
        packed(torch.zeros(1, 32, 32, 3))
    assert packed(torch.zeros(0, 32, 32, 3, dtype=torch.uint8)).cls.shape == (0, 1, 128)

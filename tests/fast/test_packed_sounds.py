"""The packed encoder of sounds against the model itself: compiled and not, of every length, in batches of all lengths."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from omni.audio.configuration_audio import OmniAudioConfig
from omni.audio.feature_extraction_audio import OmniFeatureExtractor
from omni.audio.modeling_audio import OmniAudioModel
from omni.audio.sound import Sound, SoundError
from omni.embedding.engine import Engine
from omni.fast import compiled_encoder
from omni.fast.install import pack_sounds
from omni.fast.packed_sounds import PackedAudioModel
from omni.loading.encoder import Encoder

FRAMES = (1, 2, 7, 8, 9, 64, 331, 701)
"""Up to three tiles of tokens, whole and not."""


@pytest.fixture(params=["compiled", "oneDNN"])
def way(request: pytest.FixtureRequest, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """How products are computed."""
    if request.param == "compiled" and not compiles:
        pytest.skip("there is no C++ compiler here, or a processor that compiled_encoder.cpp is not for")
    if request.param != "compiled":
        monkeypatch.setattr("omni.fast.packed_sounds.is_possible", lambda config, dtype: False)
    return str(request.param)


def make_model(**settings: Any) -> OmniAudioModel:
    """Random in every parameter: zeros and ones would hide an order mixed up or a bias forgotten."""
    torch.manual_seed(0)
    model = OmniAudioModel(OmniAudioConfig(**{"num_hidden_layers": 2, **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.08 if parameter.ndim > 1 else 0.3) + ("norm" in name))
    return model


def packed_of(model: OmniAudioModel, dtype: torch.dtype = torch.float32) -> PackedAudioModel:
    return PackedAudioModel(model, OmniFeatureExtractor(num_mel_bins=model.config.num_mel_bins), dtype)


def make_features(model: OmniAudioModel, frames: tuple[int, ...] = FRAMES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, model.config.num_mel_bins, generator=generator) for count in frames]


def one_by_one(model: OmniAudioModel, features: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(each[None]).last_hidden_state[0] for each in features]


SHAPES = {
    "the default": {},
    "a token of 2 frames, no positions": {"time_reduction": 2, "position_embedding": "none"},
    "a token of 32 frames, one block": {"time_reduction": 32, "num_hidden_layers": 1},
    "13 bands, heads of 32": {"num_mel_bins": 13, "hidden_size": 96, "intermediate_size": 160},
    "narrow": {"hidden_size": 48, "num_mel_bins": 8, "intermediate_size": 40},  # not compiled
    "relu, other eps": {"hidden_act": "relu", "layer_norm_eps": 0.1, "rms_norm_eps": 0.2},  # not compiled
}


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES.keys())
def test_packed_equals_the_model_at_every_length(settings: dict[str, Any], way: str) -> None:
    model = make_model(**settings)
    features = make_features(model)
    packed, expected = packed_of(model), one_by_one(model, features)
    panel = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16  # two vectors
    sizes = model.config.hidden_size, model.config.head_dim, model.config.intermediate_size
    whole_panels = all(size % panel == 0 for size in sizes)
    assert (packed.path == "compiled") == (way == "compiled" and whole_panels and model.config.hidden_act == "gelu")
    batch = packed.batch([each.numpy() for each in features])
    found, alone = packed(batch), packed(batch, cls_only=True)
    assert packed.grid_shapes(batch) == [(len(each) - 1,) for each in expected]
    assert found.last_hidden_state.shape == (len(FRAMES), max(map(len, expected)), model.config.hidden_size)
    assert alone.grid is None
    for row, tokens in enumerate(expected):
        count = len(tokens)
        torch.testing.assert_close(found.last_hidden_state[row, :count], tokens, rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(found.grid[row, : count - 1], tokens[1:], rtol=1e-4, atol=3e-5)
        torch.testing.assert_close(found.pooler_output[row], tokens[0], rtol=1e-4, atol=3e-5)
        assert not found.last_hidden_state[row, count:].any()
        torch.testing.assert_close(alone.cls[row, 0], tokens[0], rtol=1e-4, atol=3e-5)


def test_a_sound_has_the_same_tokens_in_every_batch_and_on_every_number_of_threads(compiles: bool) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    model, before = make_model(), torch.get_num_threads()
    features = make_features(model, (331, 5, 64, 1, 640, 8, 90))
    packed = packed_of(model)
    alone = [packed([each]).last_hidden_state[0] for each in features]
    for threads in (1, 2, 3, 4):  # each takes sounds of its own, and all share what is left: none, 1, 1, 3
        torch.set_num_threads(threads)
        try:
            for cls_only in (False, True):
                found = packed(features[::-1], cls_only).last_hidden_state.flip(0)
                for one, other in zip(found, alone, strict=True):
                    assert torch.equal(one[: len(other)], other[: len(one)]) or cls_only
                    torch.testing.assert_close(one[:1], other[:1], rtol=1e-4, atol=3e-5)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("shape", ["the default", "13 bands, heads of 32"])
def test_bfloat16_is_as_near_as_the_model_in_bfloat16(shape: str, way: str) -> None:
    model, half = make_model(**SHAPES[shape]), make_model(**SHAPES[shape]).bfloat16()
    features = make_features(model, (1, 17, 331, 702))
    expected, usual = one_by_one(model, features), one_by_one(half, [each.bfloat16() for each in features])
    packed = packed_of(model, torch.bfloat16)
    for cls_only in (False, True):
        found = packed(features, cls_only).last_hidden_state
        assert found.dtype == torch.bfloat16
        rows = slice(0, 1 if cls_only else None)
        for one, exact, other in zip(found, expected, usual, strict=True):
            error = (one[: len(exact)].float() - exact[rows]).norm() / exact[rows].norm()
            allowed = (other.float() - exact).norm() / exact.norm()
            assert 1e-4 < error < 2.5 * allowed  # not float32 by accident, and no second source of error


def test_silence_and_values_that_are_no_numbers_stay_what_they_are(way: str) -> None:
    """Silence between two sounds, and a sound with one value that is infinite."""
    model = make_model()
    packed, features = packed_of(model), make_features(model, (90, 300, 44))
    silent = torch.from_numpy(packed.prepare(Sound(np.zeros(16_000, np.float32), 16_000)))
    (expected,) = one_by_one(model, [silent])
    broken = features[1].clone()
    broken[150, 3] = float("nan")
    before = packed(features).last_hidden_state
    found = packed([features[0], silent, broken, features[2]]).last_hidden_state
    torch.testing.assert_close(found[1, : len(expected)], expected, rtol=1e-4, atol=3e-5)
    assert found[2].isnan().any()
    for row, other in ((0, 0), (3, 2)):
        torch.testing.assert_close(found[row], before[other], rtol=1e-5, atol=1e-6)


def test_no_sounds_are_no_tokens(way: str) -> None:
    assert packed_of(make_model())([]).cls.shape == (0, 1, 192)


def test_a_thread_does_not_keep_the_memory_of_a_long_sound(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    model = make_model(num_hidden_layers=1)
    packed, (short, long) = packed_of(model), make_features(model, (100, 1000))
    expected = packed([short]).last_hidden_state
    kept = packed._compiled._kept.work
    monkeypatch.setattr(compiled_encoder, "KEPT", len(kept))
    packed([long])
    assert packed._compiled._kept.work is kept
    assert torch.equal(packed([short]).last_hidden_state, expected)


def test_what_becomes_of_the_model_changes_nothing(way: str) -> None:
    model = make_model()
    packed, features = packed_of(model), make_features(model, (90, 30))
    before = packed(features).last_hidden_state.clone(), packed(features, cls_only=True).cls.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(packed(features).last_hidden_state, before[0])
    assert torch.equal(packed(features, cls_only=True).cls, before[1])


def test_features_in_any_order_of_memory_and_of_any_precision_are_read(way: str) -> None:
    model = make_model()
    packed, (features,) = packed_of(model), make_features(model, (90,))
    expected = packed([features]).last_hidden_state
    given = [features.T.contiguous().T, features.repeat_interleave(2, dim=1)[:, ::2], features.double()]
    for each in (*given, torch._neg_view(-features)):
        torch.testing.assert_close(packed([each]).last_hidden_state, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda features: features.to("meta"),
        lambda features: features.to_sparse(),
        lambda features: features.long(),
        lambda features: features[:, 1:],
        lambda features: features[:0],
        lambda features: features[None],
        lambda features: features[0],
    ],
)
def test_features_elsewhere_or_of_other_shapes_are_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = make_model(num_hidden_layers=1)
    features = make_features(model, (9, 20))
    with pytest.raises(ValueError, match=r"Expected features float\[F, 80\] of each sound on the CPU"):
        packed_of(model)([features[0], change(features[1])])


# --- Which are packed -------------------------------------------------------------------------------------------------


def hooked(model: Any) -> Any:
    model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    return model


OTHERS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "a stem of two dimensions": ({"stem": "conv2d"}, lambda model: model, {}),
    "RMSNorm in the blocks": ({"block_norm": "rms_norm"}, lambda model: model, {}),
    "no CLS token": ({"cls_token": False}, lambda model: model, {}),
    "a hook": ({}, hooked, {}),
    "another device": ({}, lambda model: model.to("meta"), {}),
    "another number of bands": ({}, lambda model: model, {"num_mel_bins": 40}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_known_is_not_packed(other: str) -> None:
    settings, change, extractor = OTHERS[other]
    small = {"num_mel_bins": 16, "hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 32}
    assert isinstance(
        pack_sounds(make_model(**small), OmniFeatureExtractor(num_mel_bins=16), torch.float32), PackedAudioModel
    )
    model = change(make_model(**small | settings))
    assert pack_sounds(model, OmniFeatureExtractor(**{"num_mel_bins": 16} | extractor), torch.float32) is None


@pytest.mark.parametrize("what", ["cls", "grid"])
def test_an_engine_takes_it_for_sounds_of_any_rate_and_length(what: Any, compiles: bool) -> None:
    encoder = Encoder(make_model(), OmniFeatureExtractor())
    engine = Engine(encoder, what)
    assert engine.path == ("compiled" if compiles else "packed")
    assert 0 < engine.error < 1e-5
    random = np.random.default_rng(0)
    lengths = ((1, 16_000), (8_000, 8_000), (50_000, 44_100))
    sounds = [Sound(random.normal(0, 0.1, count).astype(np.float32), rate) for count, rate in lengths]
    found = engine([engine.prepare(sound) for sound in sounds])
    for one, sound in zip(found, sounds, strict=True):
        expected = encoder.encode(encoder.prepare([sound]))[what][0]
        assert one.shape == expected.shape
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=3e-5)
    with pytest.raises(SoundError):
        engine.prepare(np.zeros((2, 2)))

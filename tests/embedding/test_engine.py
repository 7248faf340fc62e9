"""Engines against the models that they stand for, one picture at a time, and what they refuse."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    BitImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from omni import scenes
from omni.checkpoints.folder import CheckpointError
from omni.embedding.engine import Engine, EngineError
from omni.loading.encoder import Encoder, load_encoder
from omni.registry import get_modality

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints"


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Of several sizes, none of which is the encoder's."""
    return [
        scenes.render(scenes.sample_scene(seed, "test")).resize(size)
        for seed, size in enumerate([(640, 480), (100, 300), (225, 223)])
    ]


@pytest.fixture
def computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a processor that is faster in float32, where an engine would not."""
    monkeypatch.setattr("omni.embedding.engine.bfloat16_pays", lambda: True)


def run(engine: Engine, pictures: list[Image.Image]) -> np.ndarray:
    return np.stack(engine([engine.prepare(picture) for picture in pictures]))


@pytest.mark.parametrize("what", ["cls", "grid"])
@pytest.mark.usefixtures("computes_in_bfloat16")
def test_tokens_equal_those_of_auto_model_one_at_a_time(what: str, pictures: list[Image.Image]) -> None:
    model = AutoModel.from_pretrained(SHIPPED / "vision_tiny")
    prepare = AutoImageProcessor.from_pretrained(SHIPPED / "vision_tiny")
    with torch.no_grad():
        expected = [getattr(model(**prepare(picture, return_tensors="pt")), what)[0].numpy() for picture in pictures]
    engine = Engine(load_encoder(SHIPPED / "vision_tiny"), what)
    found = run(engine, pictures)
    assert (engine.precision, found.dtype) == ("float32", np.float32)
    assert found.shape[1:] == engine.shape
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=5e-5)
    half = Engine(load_encoder(SHIPPED / "vision_tiny"), what, "bfloat16")
    assert 1e-4 < half.error < 0.05
    lengths = np.linalg.norm(expected, axis=-1)
    assert (np.linalg.norm(run(half, pictures) - expected, axis=-1) / lengths).max() < 0.05


def test_the_packed_form_of_a_modality_is_taken_unless_it_is_off(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch, another_form: Callable[..., None]
) -> None:
    encoder = load_encoder(SHIPPED / "vision_tiny")
    another_form(monkeypatch)
    for what in ("cls", "grid"):
        engine = Engine(encoder, what)
        found = run(engine, pictures)
        assert (engine.path, engine.precision) == ("doubled", "float32")
        np.testing.assert_allclose(found, encoder.encode(encoder.prepare(pictures))[what].numpy(), rtol=1e-4, atol=5e-5)
    form = get_modality("image").pack
    assert form is not None
    monkeypatch.setattr(form, "prepare", lambda self, picture: np.ones((3, 224, 224)))  # the same for every picture
    engine = Engine(encoder, "cls")
    assert engine.path == "as it is"
    assert engine.prepare(pictures[0])["pixel_values"].dtype == torch.float32
    monkeypatch.setitem(vars(get_modality("image")), "pack", lambda model, processor, dtype: None)
    assert Engine(encoder, "cls").path == "as it is"


def test_projected_tokens_are_those_that_the_thinker_reads(pictures: list[Image.Image]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED / "omni_tiny")
    encoder = load_encoder(SHIPPED / "omni_tiny", "image")
    with torch.no_grad():
        expected = model.get_image_features(**encoder.prepare(pictures)).pooler_output
    found = run(Engine(encoder, "projected"), pictures)
    np.testing.assert_allclose(found, torch.stack(list(expected)).numpy(), rtol=1e-3, atol=1e-4)


def test_a_tower_of_transformers_runs_as_it_is(tmp_path: Path, pictures: list[Image.Image]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for number, tower in enumerate(
        [
            ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)),
            CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **sizes)),
        ]
    ):
        folder = tmp_path / str(number)
        tower.eval().save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        prepare = AutoImageProcessor.from_pretrained(folder)
        with torch.no_grad():
            expected = [tower(**prepare(picture, return_tensors="pt")).last_hidden_state[0] for picture in pictures]
        engine = Engine(load_encoder(folder), "grid")
        assert engine.path == "as it is"
        np.testing.assert_allclose(run(engine, pictures), torch.stack(expected)[:, 1:].numpy(), rtol=1e-4, atol=1e-5)


def test_where_bfloat16_is_slower_the_arithmetic_stays_float32(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni.embedding.engine.bfloat16_pays", lambda: False)
    encoder = load_encoder(SHIPPED / "vision_tiny")
    asked, chosen, exact = (Engine(encoder, "cls", precision) for precision in ("bfloat16", "auto", "float32"))
    assert [engine.precision for engine in (asked, chosen)] == ["bfloat16", "float32"]
    assert np.array_equal(run(asked, pictures), run(exact, pictures))


@pytest.mark.usefixtures("computes_in_bfloat16")
def test_a_precision_that_loses_too_much_is_refused() -> None:
    encoder = load_encoder(SHIPPED / "vision_tiny")
    with torch.no_grad():  # attention that looks at one patch alone: which one, rounding decides
        for layer in encoder.model.layers:
            layer.attention.qkv.weight *= 3
    with pytest.raises(EngineError, match=r"In bfloat16 this encoder's tokens are off by .* use float32"):
        Engine(encoder, "grid", "bfloat16")
    assert Engine(encoder, "grid", "auto").precision == "float32"
    with torch.no_grad():  # and further, until the order of sums alone decides
        for layer in encoder.model.layers:
            layer.attention.qkv.weight *= 4
    engine = Engine(encoder, "grid", "auto")
    assert (engine.precision, engine.path) == ("float32", "as it is")


def test_an_engine_may_be_told_to_compute_as_another_does(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(SHIPPED / "vision_tiny")
    found = {}
    for pays in (True, False):
        monkeypatch.setattr("omni.embedding.engine.bfloat16_pays", lambda pays=pays: pays)
        own = Engine(encoder, "cls", "bfloat16")
        assert own.dtype == ("bfloat16" if pays else "float32")
        found[pays] = [run(Engine(encoder, "cls", "bfloat16", dtype), pictures) for dtype in ("bfloat16", "float32")]
        assert np.array_equal(run(own, pictures), found[pays][0 if pays else 1])
        assert Engine(encoder, "cls", "float32", "bfloat16").dtype == "float32"
    for one, other in zip(found[True], found[False], strict=True):
        assert np.array_equal(one, other)
    half, whole = found[True]
    assert not np.array_equal(half, whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    encoder = load_encoder(SHIPPED / "vision_tiny")
    with torch.no_grad():
        encoder.model.layers[0].mlp.fc2.bias[3] = value
    for precision in ("float32", "bfloat16", "auto"):
        with pytest.raises(EngineError, match="are not finite, expected numbers; its weights are damaged"):
            Engine(encoder, "cls", precision)


def test_an_image_processor_that_makes_pictures_of_several_sizes_is_refused() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(image_size=32, patch_size=8, **shape)).eval()
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    with pytest.raises(
        EngineError,
        match="pictures of 32 x 32 and of 48 x 32 pixels and does not pad them, expected one size for all",
    ):
        Engine(Encoder(model, processor))


def test_what_an_encoder_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no 'projected'; it has cls, grid. Projected tokens are those of a fused"):
        Engine(load_encoder(SHIPPED / "vision_tiny"), "projected")
    with pytest.raises(EngineError, match="one of cls, grid, projected; found 'patches'"):
        Engine(load_encoder(SHIPPED / "vision_tiny"), "patches")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="cannot be loaded as an encoder"):
        load_encoder(tmp_path)

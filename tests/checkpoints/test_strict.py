"""Strict loading: a changed checkpoint either loads whole and unchanged, or is refused with the reason."""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS, no_tie_weights

from omni import OmniForConditionalGeneration, OmniModel, OmniVisionConfig, OmniVisionModel
from omni.checkpoints.fingerprints import expect_finite, read_tensors
from omni.checkpoints.folder import CheckpointError

Tensors = dict[str, torch.Tensor]
VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSES: dict[str, Any] = {"fused": OmniForConditionalGeneration, "encoder": OmniVisionModel}


def change(source: Path, target: Path, edit: Callable[[Tensors], None]) -> None:
    """A copy of a checkpoint in one file, with its tensors changed."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def without_fingerprints(folder: Path) -> None:
    """As an older or foreign checkpoint: what is wrong must be found by names and shapes alone."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fingerprints": None}))
    (folder / "seal.json").unlink()


# --- Every tensor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused", "encoder"])
def test_every_single_tensor_is_needed_as_it_is(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """Removed, renamed or of another shape: each time the error names it."""
    source = saved[f"{name}-file"]
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    without_fingerprints(tmp_path)

    def refused(changed: Tensors, *said: str) -> None:
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="do not fit") as error:
            CLASSES[name].from_pretrained(tmp_path)
        for words in said:
            assert words in str(error.value), (words, str(error.value))

    assert tensors
    for key, tensor in tensors.items():
        rest = {other: value for other, value in tensors.items() if other != key}
        refused(rest, f"missing: {key}\n")
        refused({**rest, f"{key}_": tensor}, f"missing: {key}\n", f"unexpected: {key}_\n")
        longer = torch.cat([tensor, tensor[:1]])
        refused(
            {**rest, key: longer}, f"shape: {key} is {tuple(longer.shape)} in the checkpoint and {tuple(tensor.shape)}"
        )


@pytest.mark.parametrize("name", ["fused", "encoder"])
def test_a_tensor_too_many(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    change(saved[f"{name}-file"], tmp_path, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="unexpected: extra"):
        CLASSES[name].from_pretrained(tmp_path)


def test_in_shards_too(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(saved["fused-shards"], folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    tensors = load_file(shards[1])
    removed = tensors.popitem()[0]
    save_file(tensors, shards[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing: {removed}"):
        OmniForConditionalGeneration.from_pretrained(folder)
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        OmniForConditionalGeneration.from_pretrained(folder)


def test_many_problems_in_one_message(saved: dict[str, Path], tmp_path: Path) -> None:
    change(saved["fused-file"], tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors)[:25]])
    with pytest.raises(ValueError, match=r"tensors that are wrong: 25\.[\s\S]*and 5 more[\s\S]*allow_missing"):
        OmniForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
def test_the_auto_classes_are_as_strict(auto: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    name = "model.image_projector.fc1.weight"
    change(saved["fused-file"], tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"missing: .*{name.removeprefix('model.')}"):
        auto.from_pretrained(tmp_path)


def test_output_loading_info_returns_the_report(saved: dict[str, Path], tmp_path: Path) -> None:
    change(saved["fused-file"], tmp_path, lambda tensors: tensors.pop("model.image_projector.fc1.weight"))
    model, report = OmniForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, OmniForConditionalGeneration)
    assert set(report["missing_keys"]) == {"model.image_projector.fc1.weight"}


# --- Damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused-file", "encoder-file", "fused-shards"])
def test_a_damaged_file_is_never_loaded(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """Cut anywhere, emptied, lengthened, or with one bit flipped anywhere in header or data."""
    folder = tmp_path / "damaged"
    shutil.copytree(saved[name], folder)
    file = sorted(folder.glob("model*.safetensors"))[0]
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    damaged = {
        "empty": b"",
        "cut in the header": whole[: header // 2],
        "cut in the data": whole[: (header + len(whole)) // 2],
        "cut by one byte": whole[:-1],
        "one byte too long": whole + b"\0",
        **{
            f"bit flipped at {place}": whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
            for place in (3, 20, header + 1, (header + len(whole)) // 2, len(whole) - 1)
        },
    }
    cls = CLASSES[name.split("-")[0]]
    for what, content in damaged.items():
        file.write_bytes(content)
        with pytest.raises((ValueError, OSError, SafetensorError)):
            pytest.fail(f"loaded although {what}: {cls.from_pretrained(folder)}")
    file.write_bytes(whole)
    cls.from_pretrained(folder)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(number: float, saved: dict[str, Path], tmp_path: Path) -> None:
    """With fingerprints, without them, and with those of these very numbers."""

    def refused(said: str) -> None:
        for cls in (OmniForConditionalGeneration, OmniVisionModel):
            with pytest.raises(CheckpointError, match=said):
                cls.from_pretrained(tmp_path)

    change(saved["fused-file"], tmp_path, lambda tensors: tensors["model.image_tower.norm.weight"][5].fill_(number))
    refused("weights of image_tower in .* are not those")
    without_fingerprints(tmp_path)
    refused(r"model.image_tower.norm.weight in '.*model.safetensors' hold NaN or infinity")
    model = OmniForConditionalGeneration.from_pretrained(saved["fused-file"])
    model.model.image_tower.norm.weight.data[5] = number
    model.save_pretrained(tmp_path)
    refused("model.image_tower.norm.weight in .* hold NaN or infinity")


def test_numbers_that_are_large_are_numbers() -> None:
    tensors = {
        "float32": torch.full((9,), torch.finfo(torch.float32).max),
        "half": torch.full((9,), 60000.0).half(),
        "bfloat16": torch.full((9,), 1e38).bfloat16(),
        "float8": torch.full((9,), 400.0).to(torch.float8_e4m3fn),
        "int": torch.full((9,), 2**31),
        "empty": torch.empty(0),
    }
    expect_finite(tensors, "here")
    for name in ("float32", "half", "bfloat16", "float8"):
        broken = tensors[name].float().clone()
        broken[3] = torch.nan
        with pytest.raises(CheckpointError, match=f"The weights {name} in here hold NaN or infinity"):
            expect_finite({**tensors, name: broken.to(tensors[name].dtype)}, "here")


def test_a_stranger_among_those_that_were_trained_together(saved: dict[str, Path], tmp_path: Path) -> None:
    """Same names, same shapes, other numbers: nothing but the fingerprint can tell."""
    stranger = OmniVisionModel(
        OmniVisionConfig(**{**VISION, "num_hidden_layers": 2}, intermediate_size=32)
    ).state_dict()

    def exchange(tensors: Tensors) -> None:
        tensors.update({f"model.image_tower.{name}": value.clone() for name, value in stranger.items()})

    change(saved["fused-file"], tmp_path, exchange)
    for cls in (OmniForConditionalGeneration, OmniModel, OmniVisionModel):
        with pytest.raises(
            ValueError, match=r"weights of image_tower in .* are not those .* train the projector again"
        ):
            cls.from_pretrained(tmp_path)


def test_only_safetensors(fused: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(saved["fused-file"] / "config.json", tmp_path)
    torch.save(fused.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        OmniForConditionalGeneration.from_pretrained(tmp_path)


def test_no_weights_no_config_no_folder(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"config\.json"):
        OmniForConditionalGeneration.from_pretrained(tmp_path)
    shutil.copy(saved["fused-file"] / "config.json", tmp_path)
    with pytest.raises(OSError, match="model.safetensors"):
        OmniForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(CheckpointError, match=r"config\.json' is damaged"):
        OmniForConditionalGeneration.from_pretrained(tmp_path)


def test_a_config_that_asks_for_more_or_less(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = saved["fused-file"]
    with pytest.raises(ValueError, match=r"missing: model.image_tower.layers.2."):
        OmniForConditionalGeneration.from_pretrained(folder, image_config={"num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"unexpected: model.image_tower.layers.1."):
        OmniForConditionalGeneration.from_pretrained(folder, image_config={"num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"unexpected: model.image_projector.fc1"):
        OmniForConditionalGeneration.from_pretrained(folder, modalities={"image": {"projector": "linear"}})


# --- Missing on purpose -----------------------------------------------------------------------------------------------


def test_what_is_missing_on_purpose_counts_as_untrained(saved: dict[str, Path], tmp_path: Path) -> None:
    folder, again = tmp_path / "a", tmp_path / "b"
    change(
        saved["fused-file"], folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "projector" in key]
    )
    without_fingerprints(folder)
    with pytest.raises(ValueError, match="missing: model.image_projector"):
        OmniForConditionalGeneration.from_pretrained(folder, allow_missing=["lm_head"])
    model = OmniForConditionalGeneration.from_pretrained(folder, allow_missing=[r"image_projector\."])
    assert model.config.untrained == ["image_projector"]
    ids = torch.tensor([[7, *[3] * 5, 8]])
    pixels = torch.zeros(1, 3, 16, 16)
    for items in (
        {"pixel_values": pixels},
        {"mm_encoder_outputs": {"image": model.model.encode_items("image", pixel_values=pixels)}},
    ):
        with pytest.raises(ValueError, match=r"untrained, .*\['image_projector'\].* allow_untrained=True"):
            model.generate(ids, max_new_tokens=2, **items)
        assert model.generate(ids, max_new_tokens=2, allow_untrained=True, **items).shape[0] == 1
    assert model.generate(ids[:, :1], max_new_tokens=2).shape[0] == 1  # of a text the projector sees nothing
    model.config.untrained = ["image_tower", "language_model"]
    with pytest.raises(ValueError, match=r"untrained, .*: \['language_model'\]"):
        model.generate(ids[:, :1], max_new_tokens=2)
    model.config.untrained = ["image_projector"]
    model.save_pretrained(again)
    loaded = OmniForConditionalGeneration.from_pretrained(again)
    assert loaded.config.untrained == ["image_projector"]
    with pytest.raises(ValueError, match="untrained"):
        loaded.generate(ids, max_new_tokens=2, pixel_values=pixels)


def test_missing_on_purpose_with_fingerprints(saved: dict[str, Path], tmp_path: Path) -> None:
    """The part that is left out has no fingerprint to keep; those of the others still hold."""
    change(
        saved["fused-file"], tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if "projector" in key]
    )
    model = OmniForConditionalGeneration.from_pretrained(tmp_path, allow_missing=[r"image_projector\."])
    assert model.config.untrained == ["image_projector"]


# --- Round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "shards"])
@pytest.mark.parametrize("name", ["fused", "encoder"])
def test_comes_back_bit_by_bit(name: str, kind: str, saved: dict[str, Path], fused: Any, encoder: Any) -> None:
    model = {"fused": fused, "encoder": encoder}[name]
    loaded = CLASSES[name].from_pretrained(saved[f"{name}-{kind}"])
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert loaded.state_dict()[key].equal(tensor), key
    assert not loaded.training


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("thinker", ["qwen3", "gpt2", "opt", "gemma"])
def test_tied_or_not(make_model: Callable[..., Any], thinker: str, tied: bool, tmp_path: Path) -> None:
    model = make_model(thinker, text={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    stored = read_tensors(tmp_path)
    assert ("lm_head.weight" in stored) != tied
    for loaded in (
        OmniForConditionalGeneration.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
    ):
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
        assert loaded.lm_head.weight.equal(model.lm_head.weight)
    base = AutoModel.from_pretrained(tmp_path)  # the head is left behind
    assert isinstance(base, OmniModel)
    for key, tensor in model.model.state_dict().items():
        assert base.state_dict()[key].equal(tensor), key


def test_a_tie_that_the_file_does_not_have(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model(text={"tie_word_embeddings": False}).save_pretrained(tmp_path / "untied")
    with pytest.raises(
        CheckpointError,
        match=r"tied: lm_head\.weight should be model\.language_model\.embed_tokens\.weight, .* set tie_word_embeddings to "
        r"false in config\.json, at the top and in text_config",
    ):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "untied", tie_word_embeddings=True)
    make_model(text={"tie_word_embeddings": True}).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "tied", tie_word_embeddings=False)


def test_a_head_that_has_left_its_embedding_is_saved_as_its_own(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """As peft leaves it that trained the embedding alone, and merged it."""
    model = make_model(text={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "tied")
    model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "apart")
    config = json.loads((tmp_path / "apart/config.json").read_text())
    assert config["text_config"].get("tie_word_embeddings", False) is False
    assert config.get("tie_word_embeddings", False) is False
    for loaded in (
        OmniForConditionalGeneration.from_pretrained(tmp_path / "apart"),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "apart"),
    ):
        assert loaded.lm_head.weight.equal(model.lm_head.weight)
        assert loaded.get_input_embeddings().weight.equal(model.get_input_embeddings().weight)
    assert "lm_head" in config["fingerprints"]


def test_the_base_model_saved_alone(fused: Any, tmp_path: Path) -> None:
    fused.model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, OmniModel)
    assert base.state_dict()["image_projector.fc1.weight"].equal(fused.model.image_projector.fc1.weight)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        OmniForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "auto"])
def test_dtype(dtype: Any, fused: Any, tmp_path: Path) -> None:
    model = OmniForConditionalGeneration(fused.config).to(torch.bfloat16 if dtype == "auto" else torch.float32)
    model.load_state_dict(fused.state_dict())
    model.save_pretrained(tmp_path)
    loaded = OmniForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.image_config.dtype == loaded.config.text_config.dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_device_map(device_map: Any, saved: dict[str, Path]) -> None:
    loaded = OmniForConditionalGeneration.from_pretrained(saved["fused-shards"], device_map=device_map)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_from_a_subfolder(fused: Any, tmp_path: Path) -> None:
    fused.save_pretrained(tmp_path / "inside")
    loaded = OmniForConditionalGeneration.from_pretrained(tmp_path, subfolder="inside")
    assert loaded.lm_head.weight.equal(fused.lm_head.weight)


# --- The encoder out of a fused model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_the_encoder_out_of_a_fused_folder(kind: str, saved: dict[str, Path], fused: Any, tmp_path: Path) -> None:
    tower = OmniVisionModel.from_pretrained(saved[f"fused-{kind}"])
    for key, tensor in fused.model.image_tower.state_dict().items():
        assert tower.state_dict()[key].equal(tensor), key
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert tower(pixels).grid.equal(fused.model.image_tower(pixels).grid)
    tower.save_pretrained(tmp_path)
    assert OmniVisionModel.from_pretrained(tmp_path).config.fingerprints == tower.config.fingerprints


def test_the_encoder_out_of_the_base_model(fused: Any, tmp_path: Path) -> None:
    fused.model.save_pretrained(tmp_path)
    tower = OmniVisionModel.from_pretrained(tmp_path, hidden_dropout_prob=0.0)
    assert tower.config.hidden_dropout_prob == 0.0
    assert tower.norm.weight.equal(fused.model.image_tower.norm.weight)


def test_a_damaged_tower_is_not_taken_out(saved: dict[str, Path], tmp_path: Path) -> None:
    change(saved["fused-file"], tmp_path, lambda tensors: tensors.pop("model.image_tower.norm.weight"))
    with pytest.raises(ValueError, match="missing: norm.weight"):
        OmniVisionModel.from_pretrained(tmp_path)


def test_an_encoder_that_the_fused_model_has_not(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model(tower="vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoders \{'image': 'vit'\}; exactly one of them must be 'omni_vision'"):
        OmniVisionModel.from_pretrained(tmp_path)


def test_a_fused_model_out_of_an_encoder(saved: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"Unknown key|do not fit"):
        OmniForConditionalGeneration.from_pretrained(saved["encoder-file"])


# --- Threads ------------------------------------------------------------------------------------------------------------


def originals() -> list[Any]:
    """What transformers replaces while it loads a model, in all threads."""
    names = ("init_weights", "tie_weights")
    return [*map(torch.nn.init.__dict__.get, TORCH_INIT_FUNCTIONS), *(getattr(PreTrainedModel, name) for name in names)]


def test_models_are_loaded_in_several_threads(make_model: Callable[..., Any], encoder: Any, tmp_path: Path) -> None:
    """Tied weights, another type, an encoder: all of transformers' patches would mix them up."""
    fused, before, random = make_model(text={"tie_word_embeddings": True}), originals(), torch.get_rng_state()
    fused.save_pretrained(tmp_path / "fused")
    encoder.save_pretrained(tmp_path / "encoder")
    ways: list[tuple[Any, Any, str, dict[str, Any]]] = [
        (OmniForConditionalGeneration, fused, "fused", {}),
        (OmniForConditionalGeneration, fused, "fused", {"dtype": torch.bfloat16}),
        (OmniForConditionalGeneration, fused, "fused", {"dtype": torch.float32}),
        (OmniVisionModel, encoder, "encoder", {}),
    ]

    def load(number: int) -> None:
        cls, expected, folder, options = ways[number % len(ways)]
        found = cls.from_pretrained(tmp_path / folder, **options)
        for name, tensor in expected.state_dict().items():
            assert found.state_dict()[name].equal(tensor.to(options.get("dtype", torch.float32))), name

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(load, range(40))) == [None] * 40
    finally:
        sys.setswitchinterval(interval)
    assert originals() == before
    assert torch.get_rng_state().equal(random), "loading draws no random numbers"


def test_weights_that_another_thread_keeps_from_being_tied(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model(text={"tie_word_embeddings": True}).save_pretrained(tmp_path)
    with no_tie_weights(), pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        OmniForConditionalGeneration.from_pretrained(tmp_path)


# --- Training and saving ------------------------------------------------------------------------------------------------


def test_a_model_is_trained_and_saved_over_the_file_that_it_came_from(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["encoder-file"], tmp_path, dirs_exist_ok=True)
    model = OmniVisionModel.from_pretrained(tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3, 16, 16)).cls.sum().backward()
    optimizer.step()
    assert OmniVisionModel.from_pretrained(tmp_path).norm.weight.equal(torch.ones(24)), "the file has changed with it"
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    for each in (model, OmniVisionModel.from_pretrained(tmp_path)):
        assert all(tensor.equal(expected[name]) for name, tensor in each.state_dict().items())

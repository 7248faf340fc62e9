"""Strict loading: whatever is done to a checkpoint, it loads whole and unchanged or says what is wrong with it."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedConfig

from omni import OmniForConditionalGeneration, OmniModel, OmniVisionConfig, OmniVisionModel, loading
from omni.loading import SAFETENSORS_TYPES, fingerprint_folder, fingerprint_parts, part_of, read_tensors

Tensors = dict[str, torch.Tensor]
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
        with pytest.raises(ValueError, match="does not fit") as error:
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


def test_whoever_reads_the_report_may_have_it(saved: dict[str, Path], tmp_path: Path) -> None:
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


def test_numbers_that_are_none(saved: dict[str, Path], tmp_path: Path) -> None:
    change(saved["fused-file"], tmp_path, lambda tensors: tensors["lm_head.weight"][0].fill_(float("nan")))
    with pytest.raises(ValueError, match="weights of lm_head are not those"):
        OmniForConditionalGeneration.from_pretrained(tmp_path)


def test_a_stranger_among_those_that_were_trained_together(saved: dict[str, Path], tmp_path: Path) -> None:
    """Same names, same shapes, other numbers: nothing but the fingerprint can tell."""
    stranger = OmniVisionModel(
        OmniVisionConfig(**{**VISION, "num_hidden_layers": 2}, intermediate_size=32)
    ).state_dict()

    def exchange(tensors: Tensors) -> None:
        tensors.update({f"model.image_tower.{name}": value.clone() for name, value in stranger.items()})

    change(saved["fused-file"], tmp_path, exchange)
    for cls in (OmniForConditionalGeneration, OmniModel, OmniVisionModel):
        with pytest.raises(ValueError, match=r"weights of image_tower are not those .* train the projector again"):
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
    with pytest.raises(OSError, match=r"config\.json"):
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
    ids = torch.tensor([[7, 8]])
    with pytest.raises(ValueError, match=r"untrained, .*\['image_projector'\].* allow_untrained=True"):
        model.generate(ids, max_new_tokens=2)
    assert model.generate(ids, max_new_tokens=2, allow_untrained=True).shape[0] == 1
    model.save_pretrained(again)
    loaded = OmniForConditionalGeneration.from_pretrained(again)
    assert loaded.config.untrained == ["image_projector"]
    with pytest.raises(ValueError, match="untrained"):
        loaded.generate(ids, max_new_tokens=2)


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
        ValueError, match=r"tied: lm_head\.weight should be model\.language_model\.embed_tokens\.weight"
    ):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "untied", tie_word_embeddings=True)
    make_model(text={"tie_word_embeddings": True}).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "tied", tie_word_embeddings=False)


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
    with pytest.raises(ValueError, match=r"Unknown key|does not fit"):
        OmniForConditionalGeneration.from_pretrained(saved["encoder-file"])


# --- Fingerprints -----------------------------------------------------------------------------------------------------


def test_parts() -> None:
    assert part_of("model.image_tower.norm.weight") == part_of("image_tower.norm.weight") == "image_tower"
    assert part_of("model.language_model.layers.0.mlp.up_proj.weight") == "language_model"
    assert part_of("lm_head.weight") == "lm_head"
    assert part_of("layers.0.norm1.weight") == part_of("norm.weight") == "encoder"


def test_a_tower_has_the_fingerprint_of_the_encoder_alone(encoder: Any) -> None:
    tensors = encoder.state_dict()
    tower = fingerprint_parts({f"model.image_tower.{name}": tensor for name, tensor in tensors.items()})
    assert list(fingerprint_parts(tensors).values()) == list(tower.values())


def test_anything_changes_the_fingerprint() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2, 2), "empty": torch.zeros(0)}
    (mark,) = fingerprint_parts(tensors).values()
    changes: list[Tensors] = [
        {**tensors, "a": torch.arange(4.0).nextafter(torch.tensor(9.0))},
        {**tensors, "a": torch.arange(4.0).bfloat16()},
        {**tensors, "b": torch.zeros(4)},
        {**tensors, "b": -torch.zeros(2, 2)},
        {"a": tensors["a"], "c": tensors["b"], "empty": tensors["empty"]},
        {key: tensors[key] for key in ("a", "b")},
    ]
    marks = [next(iter(fingerprint_parts(change).values())) for change in changes]
    assert len({mark, *marks}) == len(changes) + 1
    assert list(fingerprint_parts({key: tensors[key] for key in reversed(tensors)}).values()) == [mark]
    assert list(fingerprint_parts({**tensors, "a": torch.arange(8.0)[::2] / 2}).values()) == [mark]  # not contiguous


def test_the_configuration_of_the_file_knows_its_weights(saved: dict[str, Path]) -> None:
    for folder in saved.values():
        config = AutoConfig.from_pretrained(folder)
        assert config.fingerprints == fingerprint_parts(read_tensors(folder)) == fingerprint_folder(folder)


@pytest.mark.parametrize("at_once", [1, 7, 2**20])
def test_a_fingerprint_is_one_hash_over_names_types_shapes_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Written down here once more, in one file and in shards, of any type, gathered in pieces of any size."""
    monkeypatch.setattr(loading._Digests, "AT_ONCE", at_once)
    types = [*SAFETENSORS_TYPES.values(), torch.complex64]  # the last one is in no list
    tensors = {f"model.image_tower.{n}.weight": torch.ones(2, n).to(dtype) for n, dtype in enumerate(types)}
    tensors |= {"lm_head.weight": torch.arange(5.0), "model.language_model.scale": torch.tensor(3.0)}
    expected = {}
    for part in ("image_tower", "language_model", "lm_head"):
        digest = hashlib.sha256()
        for name in sorted(name for name in tensors if part in name):
            tensor, inner = tensors[name], name.split(f"{part}.")[1]
            digest.update(f"{inner} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(bytes(tensor.flatten().view(torch.uint8).tolist()))
        expected[part] = digest.hexdigest()[:32]
    assert fingerprint_parts(tensors) == expected
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert fingerprint_folder(tmp_path) == expected
    known = {name: tensor for name, tensor in tensors.items() if tensor.dtype != torch.complex64}
    halves = {f"model-{n}.safetensors": dict(list(known.items())[n::2]) for n in range(2)}
    (tmp_path / "model.safetensors").unlink()
    for file, half in halves.items():
        save_file(half, tmp_path / file)
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint_folder(tmp_path) == fingerprint_parts(known) != expected


def test_transformers_threads_are_left_out_for_small_checkpoints_alone(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    switch, folder = "HF_DEACTIVATE_ASYNC_LOAD", saved["fused-shards"]
    monkeypatch.delenv(switch, raising=False)
    with pytest.raises(OSError, match="on the way"), loading._one_by_one(folder, ""):
        assert os.environ[switch] == "1"
        raise OSError("on the way")
    assert switch not in os.environ
    for large in (loading._one_by_one(folder, "", small=1000), loading._one_by_one("some/name", "")):
        with large:
            assert switch not in os.environ
    monkeypatch.setenv(switch, "0")
    with loading._one_by_one(folder, ""):
        assert os.environ[switch] == "0"
    assert os.environ[switch] == "0"


# --- Ordinary checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture
def loaded_ordinarily(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of `from_pretrained`, whether the short way was taken."""
    taken: list[bool] = []
    load = loading.load_ordinary

    def spy(*args: Any) -> Any:
        taken.append((model := load(*args)) is not None)
        return model

    monkeypatch.setattr(loading, "load_ordinary", spy)
    return taken


def everything(model: torch.nn.Module) -> dict[str, Any]:
    """All that a model consists of, by path: attributes of modules, values and marks of tensors."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"{path} is"] = type(module)
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    if tensor is not None:  # torch's own notes on a buffer that was not replaced are of no account
                        marks = {mark for mark in vars(tensor) if mark not in ("persistent", "_is_buffer")}
                        marks |= {type(tensor), tensor.dtype, tensor.requires_grad}
                        tensor = tensor.tolist(), marks
                    found[f"{path}.{key}"] = tensor
            elif isinstance(value, PreTrainedConfig):
                found[f"{path}.{name}"] = type(value), value.to_dict(), value._attn_implementation, value.name_or_path
            elif name != "_modules":
                found[f"{path}.{name}"] = repr(value)
    found["shared"] = [name for name, _ in model.named_parameters()]
    return found


THINKERS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3 tied": {"tie_word_embeddings": True},
    "llama": {"model_type": "llama"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 16},
    # of which transformers' own files have other names and shapes than its modules
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("thinker", THINKERS)
@pytest.mark.parametrize("cls", [OmniForConditionalGeneration, OmniModel, OmniVisionModel])
def test_the_short_way_makes_what_transformers_makes(
    cls: Any, thinker: str, make_model: Callable[..., Any], tmp_path: Path, loaded_ordinarily: list[bool]
) -> None:
    model = make_model(text={"num_hidden_layers": 2, **THINKERS[thinker]})
    part = {OmniModel: model.model, OmniVisionModel: model.model.image_tower}.get(cls, model)
    part.save_pretrained(tmp_path)
    random = torch.get_rng_state()
    found = cls.from_pretrained(tmp_path)
    assert torch.get_rng_state().equal(random)
    expected = cls.from_pretrained(tmp_path, dtype=torch.float32)  # asks for more than nothing
    assert loaded_ordinarily == [True, False]
    expected, found = everything(expected), everything(found)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == set()


class Recurrent(OmniVisionModel):
    """Its module keeps its weights in a list as well; and it has a buffer that is saved and one that is not."""

    def __init__(self, config: OmniVisionConfig) -> None:
        super().__init__(config)
        self.recurrent = torch.nn.GRU(4, 3, batch_first=True)
        self.register_buffer("saved", torch.zeros(2))
        self.register_buffer("computed", torch.arange(3.0), persistent=False)


def test_weights_that_a_module_has_in_two_places(tmp_path: Path, loaded_ordinarily: list[bool]) -> None:
    model = Recurrent(OmniVisionConfig(**VISION)).eval()
    model.saved += torch.tensor([5.0, 7.0])
    model.save_pretrained(tmp_path)
    found, sequence = Recurrent.from_pretrained(tmp_path), torch.randn(1, 6, 4)
    assert loaded_ordinarily == [True]
    assert found.recurrent(sequence)[0].equal(model.recurrent(sequence)[0])
    assert found.saved.tolist() == [5.0, 7.0]
    assert found.computed.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModel])
def test_auto_classes_and_pipelines_take_the_short_way(
    auto: Any, saved: dict[str, Path], loaded_ordinarily: list[bool]
) -> None:
    auto.from_pretrained(saved["fused-file"])
    auto.from_pretrained(saved["fused-file"], dtype="auto", revision=None)
    auto.from_pretrained(saved["fused-file"], config=AutoConfig.from_pretrained(saved["fused-file"]))
    assert loaded_ordinarily == [auto is not AutoModel] * 3  # whose checkpoint has a head too many


OTHERS: dict[str, dict[str, Any]] = {
    "another type": {"dtype": torch.bfloat16},
    "a place": {"device_map": "cpu"},
    "attention": {"attn_implementation": "eager"},
    "a value of the configuration": {"initializer_range": 0.5},
    "one that is false": {"tie_word_embeddings": False},
    "remote code": {"trust_remote_code": True},
}


@pytest.mark.parametrize("what", OTHERS)
def test_whoever_asks_for_more_gets_it_from_transformers(
    what: str, saved: dict[str, Path], loaded_ordinarily: list[bool]
) -> None:
    model = OmniForConditionalGeneration.from_pretrained(saved["fused-file"], **OTHERS[what])
    assert loaded_ordinarily == [False]
    assert model.dtype == OTHERS[what].get("dtype", torch.float32)
    assert model.config.initializer_range == OTHERS[what].get("initializer_range", 0.02)


def test_another_default_device_is_transformers_affair(saved: dict[str, Path], loaded_ordinarily: list[bool]) -> None:
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta"):
        OmniVisionModel.from_pretrained(saved["encoder-file"])
    assert loaded_ordinarily == [False]


def test_other_files_are_transformers_affair(
    fused: Any, saved: dict[str, Path], tmp_path: Path, loaded_ordinarily: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    OmniForConditionalGeneration.from_pretrained(saved["fused-shards"])
    change(saved["encoder-file"], tmp_path / "half", lambda tensors: tensors.update(half(tensors)))
    without_fingerprints(tmp_path / "half")
    assert OmniVisionModel.from_pretrained(tmp_path / "half").dtype == torch.float32
    monkeypatch.setattr("omni.ordinary.SMALL", 1000)
    OmniForConditionalGeneration.from_pretrained(saved["fused-file"])
    assert loaded_ordinarily == [False, False, False]


def half(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


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


# --- Checksums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_checksums_are_those_of_the_files(kind: str, saved: dict[str, Path]) -> None:
    for name in ("fused", "encoder"):
        folder = saved[f"{name}-{kind}"]
        files = [*folder.glob("*.safetensors")]
        assert (len(files) > 1) == (kind == "shards")
        expected = {file.name: f"{zlib.crc32(file.read_bytes()):08x}" for file in files}
        assert json.loads((folder / "config.json").read_text())["checksums"] == expected
        assert AutoConfig.from_pretrained(folder).checksums == expected


def test_what_is_as_it_was_written_is_not_hashed_again(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    hash_it = loading.fingerprint_folder
    monkeypatch.setattr(loading, "fingerprint_folder", lambda *of: hashed.append(of[0]) or hash_it(*of))
    for name in ("fused-file", "fused-shards"):
        OmniForConditionalGeneration.from_pretrained(saved[name])
    assert hashed == []
    shutil.copytree(saved["encoder-file"], tmp_path, dirs_exist_ok=True)  # as another tool writes the same tensors
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt", "by": "it"})
    OmniVisionModel.from_pretrained(tmp_path)
    assert hashed == [tmp_path]


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_variant_has_its_own_files(size: str, encoder: Any, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path, variant="ema", max_shard_size=size)
    files = {path.name: f"{zlib.crc32(path.read_bytes()):08x}" for path in tmp_path.glob("*.safetensors")}
    assert (len(files) > 1) == (size == "20KB")
    assert all(".ema" in name for name in files)
    assert AutoConfig.from_pretrained(tmp_path).checksums == files
    found = OmniVisionModel.from_pretrained(tmp_path, variant="ema")
    assert found.state_dict()["norm.weight"].equal(encoder.state_dict()["norm.weight"])
    name = sorted(files)[0]
    damaged = bytearray((tmp_path / name).read_bytes())
    damaged[-3] ^= 1
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ValueError, match="the weights of encoder are not those"):
        OmniVisionModel.from_pretrained(tmp_path, variant="ema")


def test_a_folder_without_checksums_is_hashed(saved: dict[str, Path], tmp_path: Path) -> None:
    change(saved["encoder-file"], tmp_path, lambda tensors: tensors["norm.weight"].add_(1))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["checksums"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the weights of encoder are not those"):
        OmniVisionModel.from_pretrained(tmp_path)


def test_a_fused_model_has_no_checksums_of_its_encoders_folder(
    make_model: Callable[..., Any], encoder: Any, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path / "encoder")
    model = make_model()
    model.config.image_config.checksums = AutoConfig.from_pretrained(tmp_path / "encoder").checksums
    model.save_pretrained(tmp_path / "fused")
    assert (tmp_path / "fused/config.json").read_text().count("checksums") == 1

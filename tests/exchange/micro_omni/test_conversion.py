"""Converted models say what micro-Omni's modules say, and what goes back is what came."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import omni  # noqa: F401
from omni.checkpoints.fingerprints import fingerprint_parts
from omni.exchange.micro_omni import ConversionError, convert, to_micro_omni
from omni.exchange.micro_omni.settings import thinker_config
from omni.vision.pictures import read_picture

SCENE = Path("examples/scene.png")
TEXT = "What color is the circle?"


def pixels(side: int = 32) -> torch.Tensor:
    """A picture as micro-Omni prepares it: squashed, bilinear, from 0 to 1."""
    squashed = read_picture(SCENE).resize((side, side), 2)
    return torch.from_numpy(np.asarray(squashed, dtype=np.float32)).permute(2, 0, 1)[None] / 255


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Equal bit for bit, and with the same names and types."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# --- The encoder ------------------------------------------------------------------------------------------------------


def test_the_encoder_says_the_same_bit_for_bit(micro_omni: Any, tmp_path: Path) -> None:
    done = convert([micro_omni.write(tmp_path / "theirs") / "vision.pt"], tmp_path / "ours")
    assert (done.model, done.kept, done.left) == ("OmniVisionModel", ["img_proj"], ["optimizer", "scheduler", "step"])
    assert done.parameters == {"vision_encoder": sum(p.numel() for p in micro_omni.encoder.parameters())}
    encoder, prepare = (loader.from_pretrained(tmp_path / "ours") for loader in (AutoModel, AutoImageProcessor))
    prepared = prepare(read_picture(SCENE), return_tensors="pt")["pixel_values"]
    assert torch.equal(prepared, pixels())
    cls, grid = micro_omni.encoder(prepared)
    ours = encoder.eval()(prepared)
    assert torch.equal(ours.cls, cls)
    assert torch.equal(ours.grid, grid)


def test_the_tiny_encoder_needs_no_configuration(tmp_path: Path, make_micro_omni: Callable[..., Any]) -> None:
    """Heads are 64 wide in all of micro-Omni's configurations; that this is assumed is said."""
    tiny = {"img_size": 224, "patch": 16, "d_model": 128, "n_layers": 4, "n_heads": 2, "d_ff": 512, "dropout": 0.1}
    system = make_micro_omni(vision=tiny)
    bare = {f"_orig_mod.{name}": value for name, value in system.encoder.state_dict().items()}
    torch.save(bare, tmp_path / "vision_step_9000.pt")  # an older name, and bare tensors
    done = convert([tmp_path / "vision_step_9000.pt"], tmp_path / "ours")
    assert done.parameters == {"vision_encoder": 916_992}
    assert any("n_heads of the vision encoder is taken to be 2" in note for note in done.notes), done.notes
    model = AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(model(pixels(224)).grid, system.encoder(pixels(224))[1])


def test_the_encoder_goes_back_as_it_came(micro_omni: Any, tmp_path: Path) -> None:
    came = load(micro_omni.write(tmp_path / "theirs") / "vision.pt")
    convert([tmp_path / "theirs/vision.pt"], tmp_path / "ours")
    done = to_micro_omni(tmp_path / "ours", tmp_path / "back.pt")
    assert (done.model, done.kept) == ("micro-Omni", ["img_proj"])
    went = load(tmp_path / "back.pt")
    assert all(same(went[part], came[part]) for part in ("vit", "img_proj"))
    assert {key: went["config"]["vision"][key] for key in micro_omni.vision} == micro_omni.vision


def test_the_shipped_encoder_comes_back_as_the_same_files(tmp_path: Path) -> None:
    done = to_micro_omni("checkpoints/vision_tiny", tmp_path / "theirs")
    assert any("mean [0.5, 0.5, 0.5]" in note for note in done.notes), done.notes  # micro-Omni would not know
    convert([tmp_path / "theirs/vision.pt"], tmp_path / "ours")
    shipped = Path("checkpoints/vision_tiny")
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (shipped / "model.safetensors").read_bytes()
    elsewhere = {"_name_or_path": "", "auto_map": {}}  # where it lies, and not what it is
    for loader in (AutoConfig, AutoImageProcessor):
        ours, before = (loader.from_pretrained(folder).to_dict() for folder in (tmp_path / "ours", shipped))
        assert {**ours, **elsewhere} == {**before, **elsewhere}


# --- The Thinker ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grouped", "buffers"), [(True, False), (True, True), (False, False)])
def test_the_thinker_is_a_llama(
    grouped: bool, buffers: bool, make_micro_omni: Callable[..., Any], tmp_path: Path
) -> None:
    system = make_micro_omni(grouped=grouped, buffers=buffers)
    came = system.thinker.state_dict()
    torch.save({"model": came, "optimizer": {}}, tmp_path / "thinker.pt")
    (tmp_path / "tokenizer.model").write_bytes(system.tokenizer)
    (tmp_path / "config.json").write_text(json.dumps(system.thinker_settings))
    done = convert([tmp_path / "thinker.pt"], tmp_path / "ours")
    assert done.model == "LlamaForCausalLM"
    model, tokenizer = (kind.from_pretrained(tmp_path / "ours") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert len(tokenizer) == 200  # without <image>: there is nothing to see with
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == [1, *system.words.encode(TEXT)]
    expected = system.thinker(system.thinker.tok_emb(ids))
    torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)
    to_micro_omni(tmp_path / "ours", tmp_path / "back")
    assert same(load(tmp_path / "back/thinker.pt")["model"], came)
    assert (tmp_path / "back/tokenizer.model").read_bytes() == system.tokenizer


def test_the_tiny_thinker_has_its_parameters() -> None:
    tiny = {"vocab_size": 32_000, "d_model": 256, "n_layers": 4, "n_heads": 4, "d_ff": 1024, "ctx_len": 512}
    shapes = {"tok_emb": (32_000, 256), **{f"blocks.{i}.mlp.gate_proj": (1024, 256) for i in range(4)}}
    shapes["blocks.0.attn.k"] = (128, 256)
    tensors = {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(thinker_config(tensors, tiny, [], []))
    assert sum(parameter.numel() for parameter in model.parameters()) == 20_318_464


@pytest.mark.parametrize(("changes", "named"), [
    ({"use_moe": True}, "use_moe"),
    ({"use_swiglu": False}, "SwiGLU"),
    ({"d_model": 128}, "d_model 128 (64)"),
    ({"rope_theta": 5000}, "rope_theta 5000"),
    ({"n_heads": 7}, "n_heads 7"),
])  # fmt: skip
def test_a_thinker_that_is_no_llama_is_refused(
    changes: dict[str, Any], named: str, make_micro_omni: Callable[..., Any], tmp_path: Path
) -> None:
    system = make_micro_omni(buffers=True)
    torch.save({"model": system.thinker.state_dict()}, tmp_path / "thinker.pt")
    (tmp_path / "config.json").write_text(json.dumps({**system.thinker_settings, **changes}))
    with pytest.raises(ConversionError) as refused:
        convert([tmp_path / "thinker.pt"], tmp_path / "ours")
    assert named in str(refused.value)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "thinker.pt"]


# --- Both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_model_says_what_micro_omni_says(compiled: bool, micro_omni: Any, tmp_path: Path) -> None:
    theirs = micro_omni.write(tmp_path / "theirs", compiled)
    done = convert([theirs / "omni.pt"], tmp_path / "ours")  # vision.pt and tokenizer.model lie beside it
    assert (done.model, done.kept) == ("OmniForConditionalGeneration", ["img_proj", "proj_a"])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == 200  # no other id moved
    chat = [{"role": "user", "content": [{"type": "image", "path": str(SCENE)}, {"type": "text", "text": TEXT}]}]
    inputs = processor.apply_chat_template(
        [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    sequence, ids = micro_omni.sequence(pixels(), TEXT)
    assert inputs["input_ids"].tolist() == [[200, *ids]]
    logits = model(**inputs).logits[..., :200]
    torch.testing.assert_close(logits, micro_omni.thinker(sequence), rtol=1e-5, atol=1e-5)


def test_a_fused_model_goes_back_as_it_came(micro_omni: Any, tmp_path: Path) -> None:
    theirs = micro_omni.write(tmp_path / "theirs")
    convert([theirs], tmp_path / "ours")  # all of a folder
    to_micro_omni(tmp_path / "ours", tmp_path / "back")
    for name, parts in {"omni.pt": ("thinker", "proj_a", "proj_v"), "vision.pt": ("vit", "img_proj")}.items():
        came, went = load(theirs / name), load(tmp_path / "back" / name)
        assert set(went) == {*parts, "config"}
        assert all(same(went[part], came[part]) for part in parts)
    convert([tmp_path / "back"], tmp_path / "again")
    assert same(load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "ours/model.safetensors"))
    for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes(), name


def test_the_folders_that_training_leaves_are_one_model(micro_omni: Any, tmp_path: Path) -> None:
    """Three folders, each with the configuration of its own training, which know different things of the same parts."""
    theirs = micro_omni.write(tmp_path / "theirs", config=False)
    configs = {"thinker": micro_omni.thinker_settings | {"lr": 1, "dropout": 0.1}, "vision": micro_omni.vision}
    configs["omni"] = {"ctx_len": 128, "thinker": {"n_heads": 4, "dropout": 0.2}, "prompt": "You see."}
    for name, moved in {"omni": "omni.pt", "vision": "vision.pt", "thinker": "tokenizer.model"}.items():
        (tmp_path / name).mkdir()
        (theirs / moved).rename(tmp_path / name / moved)
        (tmp_path / name / "config.json").write_text(json.dumps(configs[name]))
    (tmp_path / "vision/vision.pt").rename(tmp_path / "vision/vision_step_20.pt")
    torch.save({}, tmp_path / "vision/vision_step_9.pt")
    named = [tmp_path / "omni", tmp_path / "vision", tmp_path / "thinker/tokenizer.model"]
    done = convert(named, tmp_path / "ours")
    assert not done.notes
    config = AutoModel.from_pretrained(tmp_path / "ours").config
    assert config.text_config.max_position_embeddings == 128
    assert config.image_config.num_attention_heads == 4
    to_micro_omni(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["prompt"] == "You see."


def test_a_vocabulary_larger_than_the_tokenizer_has_room_for_the_picture(
    make_micro_omni: Callable[..., Any], tmp_path: Path
) -> None:
    system = make_micro_omni(vocab_size=210)
    convert([system.write(tmp_path / "theirs")], tmp_path / "ours")
    config = AutoModel.from_pretrained(tmp_path / "ours").config
    assert (config.image_token_id, config.text_config.vocab_size) == (200, 210)
    to_micro_omni(tmp_path / "ours", tmp_path / "back")
    assert same(load(tmp_path / "back/omni.pt")["thinker"], system.thinker.state_dict())


def test_a_merged_file_is_the_same_model_and_goes_back(micro_omni: Any, tmp_path: Path) -> None:
    came = micro_omni.merged()
    (tmp_path / "export").mkdir()
    save_file(came, tmp_path / "export/muomni.safetensors")
    config = {
        "model_type": "muomni",
        "thinker": micro_omni.thinker_settings,
        "vision": micro_omni.vision,
        "n_layers": 9,
    }
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    (tmp_path / "export/tokenizer.model").write_bytes(micro_omni.tokenizer)
    done = convert([tmp_path / "export/muomni.safetensors"], tmp_path / "ours")
    assert done.kept == ["proj_a", "talker"]
    convert([micro_omni.write(tmp_path / "theirs")], tmp_path / "same")
    assert same(load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "same/model.safetensors"))
    to_micro_omni(tmp_path / "ours", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), came)


def test_what_was_trained_here_goes_there_and_comes_back(micro_omni: Any, tmp_path: Path) -> None:
    """Also the row of `<image>`, for which micro-Omni has no place of its own; and what lay beside it may be gone."""
    convert([micro_omni.write(tmp_path / "theirs")], tmp_path / "ours")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.ones_like(parameter) * 0.01)
    model.save_pretrained(tmp_path / "trained")
    AutoProcessor.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "trained")
    (tmp_path / "trained/tokenizer.model").write_bytes(micro_omni.tokenizer)
    to_micro_omni(tmp_path / "trained", tmp_path / "back")
    parts = load(tmp_path / "back/omni.pt")
    micro_omni_again = type(micro_omni)(micro_omni.tokenizer)
    micro_omni_again.thinker.load_state_dict(parts["thinker"])  # strictly: nothing is missing and nothing strange
    micro_omni_again.proj_v.load_state_dict(parts["proj_v"])
    micro_omni_again.encoder.load_state_dict(load(tmp_path / "back/vision.pt")["vit"])
    convert([tmp_path / "back"], tmp_path / "again")
    found = load_file(tmp_path / "again/model.safetensors")
    assert same(found, load_file(tmp_path / "trained/model.safetensors"))
    assert found["lm_head.weight"][200].any()
    assert fingerprint_parts(found) == json.loads((tmp_path / "again/config.json").read_text())["fingerprints"]


def test_without_a_tokenizer_the_model_is_written_and_it_is_said(micro_omni: Any, tmp_path: Path) -> None:
    (micro_omni.write(tmp_path / "theirs") / "tokenizer.model").unlink()
    done = convert([tmp_path / "theirs"], tmp_path / "ours")
    assert any("no tokenizer.model was found" in note for note in done.notes)
    assert AutoModel.from_pretrained(tmp_path / "ours").config.text_config.vocab_size == 201


def test_half_precision_stays_what_it_is(micro_omni: Any, tmp_path: Path) -> None:
    tensors = {name: value.half() for name, value in micro_omni.encoder.state_dict().items()}
    torch.save({"vit": tensors, "config": {"vision": micro_omni.vision}}, tmp_path / "vision.pt")
    convert([tmp_path / "vision.pt"], tmp_path / "ours")
    assert AutoModel.from_pretrained(tmp_path / "ours").dtype == torch.float16
    to_micro_omni(tmp_path / "ours", tmp_path / "back.pt")
    assert same(load(tmp_path / "back.pt")["vit"], tensors)


# --- What micro-Omni has no place for ---------------------------------------------------------------------------------


def test_a_model_that_micro_omni_has_no_place_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="'unshuffle_mlp' over 'cls\\+grid'.*'qwen3' instead of 'llama'"):
        to_micro_omni("checkpoints/omni_tiny", tmp_path / "theirs")
    assert os.listdir(tmp_path) == []


def test_a_damaged_checkpoint_does_not_go_there(micro_omni: Any, tmp_path: Path) -> None:
    convert([micro_omni.write(tmp_path / "theirs") / "vision.pt"], tmp_path / "ours")
    tensors = load_file(tmp_path / "ours/model.safetensors")
    tensors["norm.weight"][0] += 1
    save_file(tensors, tmp_path / "ours/model.safetensors")
    with pytest.raises(ConversionError, match="the file was damaged, or a part was exchanged"):
        to_micro_omni(tmp_path / "ours", tmp_path / "back")


def test_several_files_do_not_go_into_one(micro_omni: Any, tmp_path: Path) -> None:
    convert([micro_omni.write(tmp_path / "theirs")], tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"several files \(vision.pt, omni.pt\)"):
        to_micro_omni(tmp_path / "ours", tmp_path / "back.pt")
    assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"]

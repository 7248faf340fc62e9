"""What decides an answer beside the weights: it is as it was saved, or whoever loads it is told which file is not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)
from typer.testing import CliRunner

from campaigns import flips
from omni import OmniForConditionalGeneration, OmniImageProcessor, OmniModel, OmniProcessor, OmniVisionModel
from omni.checkpoints.folder import CheckpointError
from omni.checkpoints.seal import SEALS, reseal
from omni.cli.app import app
from omni.loading.checkpoint import load

Pair = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def pair(make_pair: Pair) -> tuple[Any, Any]:
    return make_pair()


@pytest.fixture(scope="module")
def sealed(pair: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused model with its processor, as they are saved."""
    folder = tmp_path_factory.mktemp("sealed")
    for part in pair:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "folder"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What is said by a `CheckpointError`, of which a pipeline makes an error of its own."""
    with pytest.raises(ValueError, match="damaged|not those|missing") as caught:
        call(*arguments, **options)
    assert isinstance(caught.value, CheckpointError) or "omni.checkpoints.folder.CheckpointError" in str(caught.value)
    return str(caught.value)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_byte_that_changes_is_refused_by_the_name_of_its_file_or_changes_nothing() -> None:
    """200 bytes of all files of the shipped checkpoints; `python -m campaigns flips` changes more of them."""
    tally = flips.run(seed=0, count=200, seconds=300)
    assert tally.failures == ()
    assert tally.tried == tally.refused + tally.unchanged == 200
    assert tally.refused > 120


FUSED: list[Callable[[Path], Any]] = [
    load,
    OmniForConditionalGeneration.from_pretrained,
    OmniModel.from_pretrained,
    OmniVisionModel.from_pretrained,
    OmniProcessor.from_pretrained,
    OmniImageProcessor.from_pretrained,
    AutoModel.from_pretrained,
    AutoModelForImageTextToText.from_pretrained,
    AutoProcessor.from_pretrained,
    AutoImageProcessor.from_pretrained,
    lambda folder: pipeline("image-text-to-text", str(folder)),
]


def test_every_way_of_loading_compares_every_file(folder: Path) -> None:
    edits: dict[str, dict[str, Any]] = {
        "config.json": {"initializer_range": 0.03},
        "generation_config.json": {"eos_token_id": 3},
        "processor_config.json": {"more": 1},
        "tokenizer_config.json": {"padding_side": "right"},
        "tokenizer.json": {"truncation": None},  # the same, but not byte for byte
    }
    for name, changes in edits.items():
        whole = (folder / name).read_bytes()
        edit(folder / name, **changes)
        for opened in FUSED:
            assert f"is not as it was saved: {name} is damaged or changed; get it again" in refusal(opened, folder)
        (folder / name).write_bytes(whole)
    for opened in FUSED:
        opened(folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    (folder / "generation_config.json").unlink()
    (folder / "added_tokens.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("")
    said = refusal(load, folder)
    for what in (
        "generation_config.json is missing",
        "chat_template.jinja is damaged",
        "added_tokens.json was not there",
        "additional_chat_templates/tool_use.jinja was not there",
    ):
        assert what in said


def test_a_seal_that_is_damaged(folder: Path) -> None:
    """In its hashes, its names, its own hash, its spaces; cut off; or with something else in it."""
    whole = (folder / "seal.json").read_text()
    values = json.loads(whole)
    for text in (
        whole.replace(values["files"]["config.json"][:4], "0123"),
        whole.replace("generation_config", "generation_konfig"),
        whole.replace(values["seal"][:4], "0123"),
        whole.replace("  ", "   ", 1),
        whole[:-10],
        "[]",
        '{"files": 3, "changed": []}',
        "",
    ):
        (folder / "seal.json").write_text(text)
        for opened in FUSED:
            assert "seal.json" in refusal(opened, folder)


def test_a_subfolder_has_its_own_seal(sealed: Path, tmp_path: Path) -> None:
    shutil.copytree(sealed, tmp_path / "inside")
    edit(tmp_path / "inside/generation_config.json", eos_token_id=3)
    for cls in (OmniForConditionalGeneration, OmniProcessor):
        assert "generation_config.json is damaged" in refusal(cls.from_pretrained, tmp_path, subfolder="inside")


def test_a_repository_on_the_hub_is_compared_too(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """As it lies in the cache; also its weights, and what else was not fetched is not asked for."""
    files = tmp_path / "models--somebody--mine/snapshots/0123456789012345678901234567890123456789"
    for part in pair:
        part.save_pretrained(files)
    (tmp_path / "models--somebody--mine/refs").mkdir()
    (tmp_path / "models--somebody--mine/refs/main").write_text(files.name)
    model, processor = (
        lambda: OmniForConditionalGeneration.from_pretrained("somebody/mine", cache_dir=tmp_path),
        lambda: OmniProcessor.from_pretrained("somebody/mine", cache_dir=tmp_path),
    )
    model()
    processor()
    edit(files / "generation_config.json", eos_token_id=3)
    assert "'somebody/mine' is not as it was saved: generation_config.json is damaged" in refusal(model)
    processor()
    edit(files / "tokenizer_config.json", padding_side="right")
    assert "tokenizer_config.json is damaged" in refusal(processor)
    (files / "generation_config.json").unlink()
    weights = bytearray((files / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (files / "model.safetensors").write_bytes(weights)
    assert re.search(r"The weights of \w+ in .*model.safetensors' are not those", refusal(model))


# --- What works as before ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0), (1, 0, 1)])
def test_model_and_processor_are_saved_in_any_order(
    pair: tuple[Any, Any], order: tuple[int, ...], tmp_path: Path
) -> None:
    for which in order:
        pair[which].save_pretrained(tmp_path)
        (AutoModelForImageTextToText, AutoProcessor)[which].from_pretrained(tmp_path)
    load(tmp_path)


def test_another_model_saved_over_it_is_another_model(folder: Path, make_pair: Pair) -> None:
    model, processor = make_pair(projector="linear")
    model.save_pretrained(folder, max_shard_size="20KB")
    with pytest.raises(CheckpointError, match="processor and model disagree"):
        load(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # transformers leaves it behind, and would read it
    assert load(folder)[0].config.modalities["image"]["projector"] == "linear"


def test_what_transformers_own_tools_write_again_is_the_same(folder: Path) -> None:
    """Also in another order, and with other spaces and ends of lines."""
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    GenerationConfig.from_pretrained(folder).save_pretrained(folder)
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        turned = json.dumps(dict(reversed(values.items())), indent=4).replace("\n", "\r\n")
        (folder / name).write_bytes(turned.encode())
        load(folder)


def test_a_folder_without_seals_loads(folder: Path) -> None:
    for kind in SEALS:
        (folder / kind).unlink(missing_ok=True)
    edit(folder / "generation_config.json", eos_token_id=3)
    assert load(folder)[0].generation_config.eos_token_id == 3


def test_a_trainer_saves_what_can_be_loaded(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = pair
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model, arguments, processing_class=processor)
    trainer.save_model()
    load(tmp_path)
    assert {"seal.json", "processor_seal.json", "training_args.bin"} <= {path.name for path in tmp_path.iterdir()}


def test_an_encoder_and_its_image_processor(pair: tuple[Any, Any], tmp_path: Path) -> None:
    pair[1].image_processor.save_pretrained(tmp_path)
    pair[0].model.image_tower.save_pretrained(tmp_path)
    edit(tmp_path / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.4])
    for opened in (OmniVisionModel.from_pretrained, AutoModel.from_pretrained, AutoImageProcessor.from_pretrained):
        assert "preprocessor_config.json is damaged" in refusal(opened, tmp_path)
    reseal(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).image_mean[2] == 0.4


# --- A change that is meant -------------------------------------------------------------------------------------------


def seal(folder: Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["checkpoint", "seal", str(folder)])
    assert result.exit_code == code, result.stderr
    return result.stdout or result.stderr


def test_a_change_that_is_meant_is_sealed_and_leaves_a_trace(folder: Path) -> None:
    before = json.loads((folder / "seal.json").read_text())
    assert before["changed"] == []
    assert seal(folder) == f"{folder} is sealed with its current files.\n"
    edit(folder / "generation_config.json", eos_token_id=3)
    assert f"omni checkpoint seal {folder}`" in refusal(load, folder)
    assert seal(folder).startswith("changed: generation_config.json\n")
    assert load(folder)[0].generation_config.eos_token_id == 3
    edit(folder / "config.json", initializer_range=0.03)
    (folder / "generation_config.json").unlink()
    assert seal(folder).startswith("changed: config.json\nremoved: generation_config.json\n")
    load(folder)
    notes = json.loads((folder / "seal.json").read_text())["changed"]
    assert [note["file"] for note in notes] == ["generation_config.json", "config.json", "generation_config.json"]
    assert notes[0]["was"] == before["files"]["generation_config.json"]
    assert notes[1]["was"] == before["files"]["config.json"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", note["date"]) for note in notes)


def test_weights_that_are_changed_on_purpose(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    before = json.loads((folder / "config.json").read_text())["fingerprints"]
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "The weights of lm_head" in refusal(load, folder)
    assert seal(folder).startswith("changed: weights of lm_head\nchanged: config.json\n")
    assert load(folder)[0].lm_head.weight.equal(tensors["lm_head.weight"])
    notes = json.loads((folder / "seal.json").read_text())["changed"]
    assert {note["part"]: note["was"] for note in notes if "part" in note} == {"lm_head": before["lm_head"]}
    tensors["lm_head.weight"][0] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "lm_head.weight in" in seal(folder, code=2)


def test_a_folder_that_never_had_a_seal_gets_one(folder: Path) -> None:
    for kind in SEALS:
        (folder / kind).unlink(missing_ok=True)
    assert "sealed: tokenizer.json\n" in seal(folder)
    load(folder)
    edit(folder / "tokenizer.json", version="2.0")
    assert "tokenizer.json is damaged" in refusal(load, folder)


def test_what_is_no_checkpoint_is_not_sealed(tmp_path: Path) -> None:
    assert "holds no file of a checkpoint" in seal(tmp_path, code=2)
    assert "does not exist" in seal(tmp_path / "nowhere", code=2)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.json").write_text("{")
    assert "config.json' is damaged" in seal(tmp_path, code=2)

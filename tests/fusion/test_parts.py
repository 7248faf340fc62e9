"""A checkpoint that holds a projector alone, and finds the rest in folders of its own."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from omni import OmniForConditionalGeneration, OmniImageProcessor, OmniModel, OmniVisionConfig, OmniVisionModel
from omni.checkpoints.folder import CheckpointError
from omni.checkpoints.seal import reseal
from omni.cli.app import app
from omni.exchange.compose import compose
from omni.fusion.parts import grow_vocabulary
from omni.loading.checkpoint import load
from omni.loading.encoder import load_encoder
from omni.questions import make_prompts
from omni.training.recipe import Recipe
from omni.training.run import run
from omni.training.tokenizer import train_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = Image.new("RGB", (32, 32), "red")


def language_model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(**SMALL, vocab_size=300, eos_token_id=1, bos_token_id=None, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).bfloat16()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `lm`, `encoder`, and `mine` with a projector for the two."""
    root = tmp_path_factory.mktemp("parts")
    lm = language_model(request.param)
    lm.generation_config.repetition_penalty = 1.25
    lm.save_pretrained(root / "lm")
    train_tokenizer(["what shape is it"] * 4, 300, placeholders={}).save_pretrained(root / "lm")
    OmniVisionModel(OmniVisionConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(root / "encoder")
    OmniImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "encoder")
    composition = compose(root / "encoder", root / "lm")
    composition.model.config.untrained = None
    composition.save(root / "mine", apart=True)
    return root


def prompts(processor: Any) -> Any:
    return make_prompts(processor, [("what shape", [PICTURE])])


def test_only_the_projector_is_saved_and_the_model_is_whole(saved: Path) -> None:
    names = load_file(saved / "mine" / "model.safetensors")
    assert {name.split(".")[1] for name in names} == {"image_projector"}
    composed = compose(saved / "encoder", saved / "lm")
    model, processor = load(saved / "mine")
    expected, found = composed.model.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=0, atol=0)
    assert model.generation_config.repetition_penalty == 1.25
    torch.testing.assert_close(
        model(**prompts(processor)).logits, composed.model.float()(**prompts(composed.processor)).logits
    )
    base = OmniModel.from_pretrained(saved / "mine")
    assert torch.equal(
        base.language_model.layers[0].mlp.up_proj.weight, model.model.language_model.layers[0].mlp.up_proj.weight
    )
    with pytest.raises(CheckpointError, match=r"has its image_tower in .*encoder'; load it from there"):
        OmniVisionModel.from_pretrained(saved / "mine")


def test_what_has_changed_is_saved_and_what_has_not_is_not(saved: Path, tmp_path: Path) -> None:
    model = OmniForConditionalGeneration.from_pretrained(
        saved / "mine"
    )  # in float32, the language model is in bfloat16
    next(model.model.image_tower.parameters()).data += 1
    model.save_pretrained(tmp_path / "deep" / "other")
    config = json.loads((tmp_path / "deep" / "other" / "config.json").read_text())
    assert list(config["parts_from"]) == ["language_model"]
    parts = {name.split(".")[1] for name in load_file(tmp_path / "deep" / "other" / "model.safetensors")}
    assert parts == {"image_projector", "image_tower"}
    again = OmniForConditionalGeneration.from_pretrained(tmp_path / "deep" / "other")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    model.config.parts_from = None
    model.save_pretrained(tmp_path / "whole")
    whole = OmniForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert whole.config.parts_from is None
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("part", ["lm", "encoder"])
def test_it_is_refused_beside_other_weights(saved: Path, tmp_path: Path, part: str) -> None:
    for name in ("lm", "encoder", "mine"):
        shutil.copytree(saved / name, tmp_path / name)
    tensors = load_file(tmp_path / part / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, tmp_path / part / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / part / "model.safetensors"
    with pytest.raises(CheckpointError, match=rf"in '{file}' are not those that were saved with this configuration"):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "mine")
    if part == "lm":
        config, whole = tmp_path / part / "config.json", (tmp_path / part / "config.json").read_text()
        config.write_text(
            whole.replace('"hidden_size"', '"hidden_sizes"').replace('attention_heads": 2', 'attention_heads": 3')
        )
        with pytest.raises(CheckpointError, match=rf"The configuration in '{config}' cannot be used: [^\n]*$"):
            load(tmp_path / "mine")
        config.write_text(whole.replace('"intermediate_size": 48', '"intermediate_size": 47'))
        with pytest.raises(
            CheckpointError, match=rf"in '{config.parent}' .* its config.json and model.safetensors do not agree"
        ):
            load(tmp_path / "mine")
        config.write_text(whole)
    header = bytearray(file.read_bytes())
    header[20] = 0xFF
    file.write_bytes(header)
    for call in (load, lambda folder: compose(tmp_path / "encoder", tmp_path / "lm")):
        with pytest.raises(CheckpointError, match=f"The weights in '{file}' are cut off or damaged"):
            call(tmp_path / "mine")


@pytest.mark.parametrize(
    ("part", "file", "key", "foreign"),
    [
        ("lm", "config.json", "model_type", {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        ("lm", "tokenizer_config.json", "tokenizer_class", {"AutoTokenizer": ["own.Tokenizer", None]}),
        ("encoder", "config.json", "model_type", {"AutoConfig": "own.Config", "AutoModel": "own.Model"}),
        ("encoder", "preprocessor_config.json", "image_processor_type", {"AutoImageProcessor": "own.Processor"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_of_a_folder_is_not_run_and_nobody_is_asked_about_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, file: str, key: str, foreign: Any
) -> None:
    """transformers asks on the terminal, and waits; whoever types a y has run it."""

    def asked(question: str = "") -> str:
        questions.append(question)
        return "y"

    questions: list[str] = []
    monkeypatch.setattr("builtins.input", asked)
    for name in ("lm", "encoder", "mine"):
        shutil.copytree(saved / name, tmp_path / name)
    path = tmp_path / part / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "own", "auto_map": foreign}))
    (tmp_path / part / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    reseal(tmp_path / part)
    for call, folder in ((load, "mine"), (load_encoder, "encoder")):
        with contextlib.suppress(CheckpointError):  # who does not read this file does not mind
            call(tmp_path / folder)
    with pytest.raises(CheckpointError):
        compose(tmp_path / "encoder", tmp_path / "lm")
    assert not questions
    assert not (tmp_path / "ran").exists()


def test_sealing_again_keeps_what_is_known_of_the_parts_elsewhere(saved: Path, tmp_path: Path) -> None:
    for name in ("lm", "encoder", "mine"):
        shutil.copytree(saved / name, tmp_path / name)
    before = json.loads((tmp_path / "mine" / "config.json").read_text())["fingerprints"]
    tensors = load_file(tmp_path / "mine" / "model.safetensors")
    tensors["model.image_projector.fc1.bias"] += 1
    save_file(tensors, tmp_path / "mine" / "model.safetensors", metadata={"format": "pt"})
    done = CliRunner().invoke(app, ["checkpoint", "seal", str(tmp_path / "mine")])
    assert "changed: weights of image_projector" in done.stdout
    after = json.loads((tmp_path / "mine" / "config.json").read_text())["fingerprints"]
    assert {part for part in {*before, *after} if before.get(part) != after.get(part)} == {"image_projector"}
    load(tmp_path / "mine")


def test_a_configuration_that_is_far_too_large_for_all_parts_is_refused(saved: Path, tmp_path: Path) -> None:
    for name in ("lm", "encoder", "mine"):
        shutil.copytree(saved / name, tmp_path / name)
    path = tmp_path / "mine" / "config.json"
    values = json.loads(path.read_text())
    values["text_config"]["intermediate_size"] = 10**8
    path.write_text(json.dumps(values))
    reseal(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="far more than the weights"):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "mine")


def test_parts_that_have_moved_can_be_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "mine", tmp_path / "mine")
    shutil.copytree(saved / "encoder", tmp_path / "encoder")
    with pytest.raises(CheckpointError, match=r"has its language_model in .*/lm', which is not there"):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "mine")
    places = {"language_model": str(saved / "lm")}
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "mine", parts_from=places)
    assert model.config.parts_from == {"image_tower": str(tmp_path / "encoder"), **places}


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_is_never_the_most_likely(tied: bool) -> None:
    model = language_model(tied)
    before = model(torch.arange(20)[None]).logits
    grow_vocabulary(model, 303)
    logits = model(torch.arange(20)[None]).logits
    torch.testing.assert_close(logits[..., :300], before)
    assert (logits[..., 300:] < before.max(-1, keepdim=True).values).all()
    assert torch.equal(logits[..., 300], logits[..., 302])


def test_a_merged_checkpoint_is_whole(saved: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["checkpoint", "merge", str(saved / "mine"), str(tmp_path / "whole"), "--json"])
    assert json.loads(done.stdout) == {"checkpoint": str(tmp_path / "whole"), "dtype": "float32"}
    shutil.copytree(saved / "mine", tmp_path / "mine")
    whole, mine = load(tmp_path / "whole")[0], load(saved / "mine")[0]
    assert whole.config.parts_from is None
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in mine.state_dict().items())
    refused = CliRunner().invoke(app, ["checkpoint", "merge", str(saved / "mine"), str(tmp_path / "whole")])
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr


@pytest.mark.parametrize("lora", [False, True])
def test_training_writes_what_it_learns_alone(saved: Path, tmp_path: Path, lora: bool) -> None:
    PICTURE.save(tmp_path / "red.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "red.png", "question": "what shape", "answer": "red"}\n' * 4)
    rows = {"path": str(tmp_path / "rows.jsonl")}
    learns = {"lora": {"target_modules": ".*language_model.*q_proj", "modules_to_save": ["image_projector"]}}
    recipe = {
        "objective": "answers",
        "model": {"checkpoint": str(saved / "mine")},
        "train": rows,
        **(learns if lora else {"freeze": [r"^(?!model\.image_projector)"]}),
        "optimizer": {"name": "adamw", "lr": 0.01},
        "arguments": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "save_steps": 1,
            "report_to": "none",
            "use_cpu": True,
        },
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    run(Recipe.read(tmp_path / "recipe.json"))
    again = Recipe.read(tmp_path / "recipe.json")
    shutil.rmtree(tmp_path / "out" / "run" / "checkpoint-2")
    for file in (tmp_path / "out").glob("*.*"):
        file.unlink()
    run(again, resume=True)
    megabytes = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    alone = sum(file.stat().st_size for file in (saved / "mine").glob("*.safetensors"))
    assert megabytes <= 3 * alone * (2 if lora else 1)  # the result and two checkpoints of the run
    model, _ = load(tmp_path / "out")
    assert not model.config.untrained
    before = load(saved / "mine")[0].state_dict()
    changed = {name.split(".")[1] for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == ({"image_projector", "language_model"} if lora else {"image_projector"})

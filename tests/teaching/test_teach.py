"""One command makes a language model see: with tiny models, real files, and a few steps."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from omni import (
    OmniAudioConfig,
    OmniAudioModel,
    OmniFeatureExtractor,
    OmniForConditionalGeneration,
    OmniImageProcessor,
    OmniProcessor,
    OmniVisionConfig,
    OmniVisionModel,
)
from omni.cli.app import app
from omni.data.conversations import ask
from omni.data.sources import ManifestError
from omni.evaluation.language import PASSAGE, language_test
from omni.loading.checkpoint import load
from omni.questions import make_prompts, write_prompts
from omni.teaching import Lesson, budget, teach, watch
from omni.teaching.plan import plan
from omni.training.parts import CHECKPOINTING
from omni.training.recipe import Recipe, RecipeError
from omni.training.run import run
from omni.training.sections import Mixture
from omni.training.tokenizer import train_tokenizer
from omni.worlds import find_world

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TURNS = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|end|>\n{% endfor %}"
TURNS += "{% if add_generation_prompt %}assistant: {% endif %}"
COLORS = ("red", "green", "blue", "black")
STEPS = ["arguments.max_steps=6", "arguments.dataloader_num_workers=0", "arguments.save_steps=2"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `lm` and `encoder`, and `rows.jsonl` about 12 pictures."""
    root = tmp_path_factory.mktemp("given")
    torch.manual_seed(1)
    config = LlamaConfig(**SMALL, vocab_size=300, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True)
    language_model = LlamaForCausalLM(config).bfloat16()
    language_model.generation_config.eos_token_id = [1, *range(7, 300, 8)]  # a random model seldom ends
    language_model.save_pretrained(root / "lm")
    tokenizer = train_tokenizer(["what color is it", *COLORS] * 4, 300, placeholders={})
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(root / "lm")
    OmniVisionModel(OmniVisionConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(root / "encoder")
    OmniImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "encoder")
    rows = []
    for number in range(12):
        color = COLORS[number % 4]
        Image.new("RGB", (32, 32 + number), color).save(root / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what color is it", "answer": color, "kind": "color"})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def heard(given: Path) -> Path:
    """The folder `hearing` beside the others; and rows of sounds, of 12 lengths, with and without pictures."""
    soundfile = pytest.importorskip("soundfile")
    OmniAudioModel(OmniAudioConfig(**SMALL, stem_channels=8)).save_pretrained(given / "hearing")
    OmniFeatureExtractor(mean=-4.5).save_pretrained(given / "hearing")
    rows = []
    for number in range(12):
        wave = 0.3 * np.sin(2 * np.pi * 200 * (1 + number % 4) * np.arange(4000 + 800 * number) / 16_000)
        soundfile.write(given / f"{number}.wav", wave.astype(np.float32), 16_000)
        sound = {"audio": f"{number}.wav", "answer": COLORS[number % 4]}
        rows += [sound | {"question": "what color is it", "kind": "heard"}, sound | {"image": f"{number}.png"}]
    (given / "heard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::2]))
    (given / "seen_and_heard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return given


def lesson_of(given: Path, **more: Any) -> Lesson:
    about: dict[str, Any] = {"data": str(given / "rows.jsonl"), "test": str(given / "rows.jsonl"), "overrides": STEPS}
    about |= {"encoders": {"image": str(given / "encoder")}}
    return Lesson(language_model=str(given / "lm"), **about | more)


@pytest.fixture(scope="module")
def taught(given: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What a lesson left, and what was said on the way."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "EVERY", 0.0)
        patch.setattr(watch, "SHARE", 1e9)
        folder = tmp_path_factory.mktemp("out") / "mine"
        teach(lesson_of(given), folder, say=said.append)
    return folder, said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def expect_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, msg=name)


def test_only_what_was_learnt_is_saved_and_it_answers(taught: tuple[Path, list[str]], given: Path) -> None:
    folder, _ = taught
    assert {name.split(".")[1] for name in weights(folder)} == {"image_projector"}
    before = weights(folder / "start")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())
    model, processor = load(folder)
    assert model.config.untrained == []
    model.generate(**make_prompts(processor, [("what color is it", [given / "0.png"])]), max_new_tokens=2)
    alone = LlamaForCausalLM.from_pretrained(given / "lm", dtype=torch.float32)
    prompt = write_prompts(processor, [ask("is it", items=())])["input_ids"]
    assert torch.equal(model(input_ids=prompt).logits[..., :300], alone(input_ids=prompt).logits[..., :300])


@pytest.mark.new_chats
@pytest.mark.parametrize("senses", [("audio",), ("image", "audio")])
def test_it_hears(heard: Path, tmp_path: Path, senses: tuple[str, ...]) -> None:
    """The held-out score stands beside that with other sounds; the folder of the trained parts answers."""
    rows = heard / ("seen_and_heard.jsonl" if len(senses) > 1 else "heard.jsonl")
    folders = {"audio": "hearing", "image": "encoder"}
    encoders = {name: str(heard / folders[name]) for name in senses}
    said: list[str] = []
    outcome = teach(
        lesson_of(heard, encoders=encoders, data=str(rows), test=str(rows)), tmp_path / "mine", say=said.append
    )
    others = "another sound and picture" if len(senses) > 1 else "another sound"
    assert re.search(rf"Held out [\d.]+; best constant answer 0.25, with {others} [\d.]+", said[-1])
    assert outcome.result.sight_tests.keys() == {*senses}
    assert {name.split(".")[1] for name in weights(tmp_path / "mine")} == {f"{name}_projector" for name in senses}
    card = (tmp_path / "mine" / "README.md").read_text()
    assert f"pipeline_tag: {senses[0]}-text-to-text" in card
    assert card.count("swapped sound") >= 1
    model, processor = load(tmp_path / "mine")
    assert model.config.untrained == []
    files = [heard / "0.wav", heard / "0.png"][: len(senses)]
    model.generate(**make_prompts(processor, [("", files)]), max_new_tokens=2)


def test_an_encoder_without_items_in_the_data_is_refused(heard: Path, tmp_path: Path) -> None:
    both = {"image": str(heard / "encoder"), "audio": str(heard / "hearing")}
    with pytest.raises(ManifestError, match="None of 12 rows of the data has a sound, so .* leave out its encoder"):
        teach(lesson_of(heard, encoders=both), tmp_path / "mine", say=lambda line: None)
    assert not (tmp_path / "mine").exists()


def test_the_held_out_score_stands_beside_what_it_has_to_beat(taught: tuple[Path, list[str]]) -> None:
    lines = [line for line in taught[1] if "Held out" in line]
    assert len(lines) == 6
    assert "4 of 24 samples" in lines[0]
    assert "left. Held out 0." in lines[0]
    assert "best constant answer 0.25, with another picture 0." in lines[0]


def test_the_card_has_scores_and_both_tests(taught: tuple[Path, list[str]]) -> None:
    folder, _ = taught
    card = (folder / "README.md").read_text()
    for part in ("# lm takes pictures", "The projector alone learnt from 24 samples", "Sight test", "| color | 12 |"):
        assert part in card
    assert "Language test: 10 of 10 text-only answers are those of the language model alone" in card
    found = json.loads((folder / "evaluation.json").read_text())["language"]
    assert found["perplexity"] == found["perplexity_alone"] > 1


def test_omni_train_makes_the_same_of_the_recipe(taught: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = taught
    run(Recipe.read(folder / "recipe.json", [f"output={tmp_path / 'again'}"]))
    expect_equal(weights(tmp_path / "again"), weights(folder))


@pytest.mark.parametrize("cut", ["Measuring", "Wrote", "16 of 24 samples", "sight"])
def test_an_interrupted_lesson_is_resumed(
    taught: tuple[Path, list[str]], given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    monkeypatch.setattr(watch, "EVERY", 0.0)
    monkeypatch.setattr(watch, "SHARE", 1e9)

    def say(line: str) -> None:
        if cut in line:
            raise KeyboardInterrupt

    def progress(label: str, done: int, total: int) -> None:
        if cut == "sight" and "swapped" in label:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(lesson_of(given), tmp_path / "mine", say=say, progress=progress)
    with pytest.raises(FileExistsError, match="--resume"):
        teach(lesson_of(given), tmp_path / "mine")
    with pytest.raises(RecipeError, match="began with another lora"):
        teach(lesson_of(given, lora=True), tmp_path / "mine", resume=True)
    said: list[str] = []
    teach(lesson_of(given), tmp_path / "mine", resume=True, say=said.append)
    expect_equal(weights(tmp_path / "mine"), weights(taught[0]))
    if cut == "16 of 24 samples":  # step 4, from the checkpoint after step 2
        assert [line.split()[0] for line in said if "Held out" in line] == ["12", "16", "20", "24"]


def test_lora_saves_adapters_that_are_asked_with_their_base(given: Path, tmp_path: Path) -> None:
    outcome = teach(lesson_of(given, lora=True), tmp_path / "mine", say=lambda line: None)
    names = weights(tmp_path / "mine")
    assert any("image_projector" in name for name in names)
    assert any("q_proj.lora_A" in name for name in names)
    assert all("image_projector" in name or "lora_" in name for name in names)
    assert outcome.result.language is not None
    load(tmp_path / "mine")


def test_rows_without_a_test_are_split_by_their_files(given: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (given / "rows.jsonl").read_text().splitlines()]
    both = [row | {"question": question} for row in rows for question in ("what color is it", "color")]
    (given / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    teach(lesson_of(given, data=str(given / "both.jsonl"), test=None), tmp_path / "mine", say=lambda line: None)
    train, test = (
        [json.loads(line) for line in (tmp_path / "mine" / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    assert len(train) + len(test) == 24
    assert len(test) == 2
    files = [{row["messages"][0]["content"][0]["path"] for row in part} for part in (train, test)]
    assert not files[0] & files[1]
    assert Recipe.read(tmp_path / "mine" / "recipe.json").arguments["max_steps"] == 6


def test_little_memory_means_smaller_batches_and_layers_that_are_computed_twice(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taught: tuple[Path, list[str]]
) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: 0)
    teach(lesson_of(given), tmp_path / "mine", say=lambda line: None)
    arguments = Recipe.read(tmp_path / "mine" / "recipe.json").arguments
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == (1, 4)
    assert arguments[CHECKPOINTING] is True
    for name, tensor in weights(tmp_path / "mine").items():  # the same batches, added up in another order
        torch.testing.assert_close(tensor, weights(taught[0])[name], rtol=0.1, atol=0.02)


def test_rows_of_text_are_a_tenth_of_the_samples(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]})
    )
    monkeypatch.setattr("omni.teaching.plan.measure", lambda recipe: budget.Budget(4, 1, False, 0.5, 8))
    plan(lesson_of(given, text=str(text)), tmp_path, lambda line: None)
    train = Recipe.read(tmp_path / "recipe.json").train
    assert isinstance(train, Mixture)
    assert [(part.data.path, part.weight) for part in train.sources] == [
        (str(given / "rows.jsonl"), 0.9),
        (str(text), 0.1),
    ]


def test_minutes_become_steps(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = budget.Budget(rows=4, accumulate=2, checkpointing=False, seconds=2.0, learning=7)
    monkeypatch.setattr("omni.teaching.plan.measure", lambda recipe: found)
    monkeypatch.setattr("omni.teaching.course.run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        teach(lesson_of(given, minutes=3, overrides=[]), tmp_path / "mine", say=lambda line: None)
    arguments = Recipe.read(tmp_path / "mine" / "recipe.json").arguments
    assert arguments["max_steps"] == 90
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == (4, 2)


def test_without_data_it_learns_from_what_is_drawn(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(find_world().lesson["settings"], "pictures", 1)
    monkeypatch.setitem(find_world().lesson["evaluate"], "count", 2)
    said: list[str] = []
    lesson = lesson_of(given, data=None, test=None, lora=True, overrides=["arguments.max_steps=3", STEPS[1]])
    outcome = teach(lesson, tmp_path / "mine", say=said.append)
    assert said[0] == "No data are named, so it learns from generated pictures"
    assert {"shape", "where", "caption"} <= {score.kind for score in outcome.result.scores}
    stages = [Recipe.read(tmp_path / "mine" / f"{name}.json") for name in ("stage-1", "stage-2", "recipe")]
    assert [recipe.train.max_objects for recipe in stages] == [2, 4, 6]
    assert [recipe.optimizer.lr for recipe in stages] == pytest.approx([4e-4, 2.8e-4, 1.6e-4])
    assert [recipe.lora is not None for recipe in stages] == [False, False, True]
    assert [line.split()[0] for line in said if "Held out" in line] == ["4", "8", "12"]
    first, second = (weights(tmp_path / "mine" / f"stage-{number}") for number in (1, 2))
    assert any(not torch.equal(tensor, first[name]) for name, tensor in second.items())
    load(tmp_path / "mine")


def test_text_is_answered_before_anything_is_learnt(taught: tuple[Path, list[str]], given: Path) -> None:
    start = taught[0] / "start"
    model = OmniForConditionalGeneration.from_pretrained(start)
    processor = OmniProcessor.from_pretrained(start)
    assert model.config.untrained == ["image_projector"]
    model.generate(**write_prompts(processor, [ask("is it", items=())]), max_new_tokens=2)
    with pytest.raises(ValueError, match="untrained"):
        model.generate(**make_prompts(processor, [("is it", [given / "0.png"])]), max_new_tokens=2)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--output", "OUT"], "Expected a language model, an encoder and a new folder"),
        (["LM", "--image", "ENCODER", "--output", "OUT", "--test", "ROWS"], "--test is for data of your own"),
        (["LM", "--image", "ENCODER", "--output", "GIVEN"], "exists already"),
        (["LM", "--image", "LM", "--output", "OUT"], "no encoder"),
        (["ENCODER", "--image", "ENCODER", "--output", "OUT"], "which is no causal language model"),
        (["LM", "--image", "ENCODER", "--output", "OUT", "--set", "no"], "An override looks like key=value"),
    ],
)
def test_what_cannot_be_taught_is_refused(given: Path, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    places = {"LM": given / "lm", "ENCODER": given / "encoder", "ROWS": given / "rows.jsonl", "GIVEN": given}
    places |= {"OUT": tmp_path / "out"}
    done = CliRunner().invoke(app, ["teach", *(str(places.get(each, each)) for each in arguments)])
    assert done.exit_code == 2, done.output
    assert complaint in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_page_runs(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of docs/teach.md, for less than a minute."""
    page = Path("docs/teach.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(find_world().lesson["settings"], "pictures", 1)
    monkeypatch.setitem(find_world().lesson["evaluate"], "count", 2)
    (tmp_path / "checkpoints").mkdir()
    for name, target in (("SmolLM2-135M-Instruct", "lm"), ("checkpoints/vision_tiny", "encoder")):
        (tmp_path / name).symlink_to(given / target)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code.replace("minutes=60", "minutes=0.01"), {})
    assert out.getvalue().splitlines()[-1] == "10"


def test_the_language_test_notices_what_has_changed(taught: tuple[Path, list[str]], given: Path) -> None:
    model, processor = load(taught[0])
    same = language_test(model, processor)
    assert same is not None
    alone = LlamaForCausalLM.from_pretrained(given / "lm", dtype=torch.float32)
    ids = processor.tokenizer(PASSAGE, return_tensors="pt")["input_ids"]
    assert same.perplexity == pytest.approx(alone(input_ids=ids, labels=ids).loss.exp().item(), rel=1e-3)
    assert (same.same, same.n) == (10, 10)
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    changed = language_test(model, processor)
    assert changed is not None
    assert changed.same < 10
    assert changed.perplexity_alone == same.perplexity_alone != changed.perplexity
    assert [spoken.alone for spoken in changed.answers] == [spoken.alone for spoken in same.answers]
    model.config.parts_from = None
    assert language_test(model, processor) is None


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_all_doors_take_a_precision(
    taught: tuple[Path, list[str]], given: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run_command = str(taught[0]), CliRunner().invoke
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert {parameter.dtype for parameter in load(folder, dtype)[0].parameters()} == {expected}
    asked = run_command(app, ["ask", str(given / "0.png"), "what is it", "--checkpoint", folder, "--dtype", dtype])
    assert asked.exit_code == 0, asked.output
    rows = ["--data", str(given / "rows.jsonl"), "--max-new-tokens", "2"]
    evaluated = run_command(app, ["evaluate", folder, *rows, "--dtype", dtype, "--json"])
    assert evaluated.exit_code == 0, evaluated.output
    found = json.loads(evaluated.stdout)
    assert (found["settings"]["dtype"], found["device"]) == (dtype, f"cpu, {str(expected).removeprefix('torch.')}")
    for command, place in (("serve", "omni.serving.server.serve"), ("app", "omni.app.server.serve")):
        taken: list[Any] = []
        monkeypatch.setattr(place, lambda *arguments, taken=taken: taken.extend(arguments))
        assert run_command(app, [command, folder, "--dtype", dtype]).exit_code == 0
        assert taken[-1] == dtype


def write_gguf(folder: Path, file: Path) -> None:
    """The language model of a folder as other programs keep it."""
    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    config, vocabulary = model.config, tokenizer.get_vocab()
    made = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in made["added_tokens"]}
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in made["model"]["merges"]])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        if name != "lm_head.weight":
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_NAMES = {
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def test_a_gguf_file_is_taught_like_a_folder(given: Path, tmp_path: Path) -> None:
    write_gguf(given / "lm", tmp_path / "model.gguf")
    lesson = lesson_of(given).model_copy(update={"language_model": str(tmp_path / "model.gguf")})
    outcome = teach(lesson, tmp_path / "mine", say=lambda line: None)
    assert outcome.result.language is not None
    assert outcome.result.language.same == 10
    (tmp_path / "model.gguf").unlink()
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "mine", tmp_path / "there")
    processor = OmniProcessor.from_pretrained(tmp_path / "there" / "mine")
    model = OmniForConditionalGeneration.from_pretrained(
        tmp_path / "there" / "mine", parts_from={"image_tower": str(given / "encoder")}
    )
    model.generate(**make_prompts(processor, [("what color is it", [given / "0.png"])]), max_new_tokens=1)

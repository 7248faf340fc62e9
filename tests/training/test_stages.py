"""The stages of training, each on tiny models and real files: what is to learn learns, what is frozen stays."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, EvalPrediction

from omni import OmniImageProcessor, OmniVisionModel
from omni.checkpoints.folder import CheckpointError
from omni.checkpoints.seal import reseal
from omni.data.conversations import ExampleError
from omni.evaluation import choose_settings, evaluate
from omni.evaluation.hashes import hash_weights
from omni.loading.checkpoint import load
from omni.session import answer
from omni.training.answers import AnswerTraining
from omni.training.contrastive import ContrastiveAlignment
from omni.training.fused import build_omni
from omni.training.objectives import OBJECTIVES
from omni.training.parts import FrozenParts, freeze
from omni.training.pixels import Normalization
from omni.training.recipe import Recipe, RecipeError
from omni.training.run import prepare, run

CONFIGS = Path(__file__).parents[2] / "configs"
ARGUMENTS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "remove_unused_columns": False,
    "seed": 0,
}


def recipe(name: str, output: Path, arguments: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """A shipped recipe with few steps."""
    settings = json.loads((CONFIGS / f"train_{name}.json").read_text())
    settings |= {"arguments": ARGUMENTS | (arguments or {}), "output": str(output)} | changes
    for part in ("train", "evaluate"):
        if settings[part] and "count" in settings[part]:
            settings[part]["count"] = 8
    return Recipe.model_validate(settings)


@pytest.fixture(scope="session")
def checkpoint(small: Path) -> Path:
    """A tiny fused model; beside it are its encoder and the configuration of its Thinker."""
    return small / "omni"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of pictures by class."""
    root = tmp_path_factory.mktemp("pictures")
    for split in ("train", "test"):
        for name, value in (("dark", 40), ("bright", 220)):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                noise = np.random.default_rng(value + i).integers(-20, 20, (24, 24, 3))
                Image.fromarray((value + noise).astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_projector_is_aligned_between_frozen_parts(checkpoint: Path, tmp_path: Path) -> None:
    model = {"checkpoint": str(checkpoint), "image": {"projector": "mlp", "output": "grid"}}
    folder = run(recipe("projector", tmp_path, model=model))
    before, after = weights(checkpoint), weights(folder)
    trained = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert trained == {name for name in after if "image_projector" in name}
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert loaded.config.modalities["image"]["projector"] == "mlp"


def test_the_attention_that_a_recipe_asks_for_is_used_everywhere(checkpoint: Path) -> None:
    encoder = str(checkpoint.parent / "encoder")
    fresh = {"thinker": str(checkpoint.parent / "thinker.json"), "image": {"encoder": encoder, "projector": "linear"}}
    sections: list[dict[str, Any]] = [{"checkpoint": str(checkpoint)}, fresh]
    sections.append({"checkpoint": str(checkpoint), "image": {"projector": "mlp"}})
    for section in sections:
        for wanted in ("eager", "sdpa"):
            model, _ = build_omni(**section, config={"attn_implementation": wanted})
            tower, thinker = model.model.image_tower, model.model.language_model
            assert [m.config._attn_implementation for m in (model, tower, thinker)] == [wanted] * 3


def test_a_checkpoint_takes_the_weights_of_a_better_encoder(checkpoint: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint.parent / "encoder")
    torch.manual_seed(1)
    better = OmniVisionModel(config)
    better.save_pretrained(tmp_path / "better")
    OmniImageProcessor(do_normalize=False).save_pretrained(tmp_path / "better")
    old, _ = build_omni(checkpoint=str(checkpoint))
    model, processor = build_omni(checkpoint=str(checkpoint), image={"encoder": str(tmp_path / "better")})
    assert not processor.image_processor.do_normalize
    expected = {f"model.image_tower.{name}": tensor for name, tensor in better.state_dict().items()}
    found, before = model.state_dict(), old.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(tensor, expected.get(name, before[name])) for name, tensor in found.items())
    assert not all(torch.equal(before[name], tensor) for name, tensor in expected.items())
    changes = {"encoder": str(tmp_path / "better"), "projector": "mlp"}
    both, processor = build_omni(checkpoint=str(checkpoint), image=changes)
    assert not processor.image_processor.do_normalize
    assert both.config.modalities["image"]["projector"] == "mlp"
    assert all(torch.equal(both.state_dict()[name], tensor) for name, tensor in expected.items())


def test_a_new_model_sees_as_its_encoder_was_trained_to(checkpoint: Path, tmp_path: Path) -> None:
    """A mean and a scale of its own, as the seed's encoders have: nothing else would tell that pictures look different."""
    shutil.copytree(checkpoint.parent / "encoder", tmp_path / "plain")
    OmniImageProcessor(do_normalize=False).save_pretrained(tmp_path / "plain")
    image = {"encoder": str(tmp_path / "plain"), "projector": "linear"}
    fresh = recipe(
        "omni_scenes", tmp_path / "run", model={"thinker": str(checkpoint.parent / "thinker.json"), "image": image}
    )
    loaded = AutoProcessor.from_pretrained(run(fresh))
    black = loaded(images=Image.new("RGB", (9, 9)), text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(black, torch.zeros(1, 3, 224, 224))


def test_an_encoder_that_computes_otherwise_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint.parent / "encoder")
    config.num_attention_heads *= 2  # the same shapes
    config.layer_norm_eps = 1e-3
    OmniVisionModel(config).save_pretrained(tmp_path / "other")
    OmniImageProcessor().save_pretrained(tmp_path / "other")
    with pytest.raises(RecipeError, match=r"has layer_norm_eps 0\.001 where the image tower has 1e-05, num_attention"):
        build_omni(checkpoint=str(checkpoint), image={"encoder": str(tmp_path / "other")})


def test_frozen_parts_rest_and_cost_no_backward(checkpoint: Path, tmp_path: Path) -> None:
    settings = recipe(
        "projector",
        tmp_path,
        model={"checkpoint": str(checkpoint), "image": {"projector": "mlp"}},
    )
    objective = OBJECTIVES["answers"](settings)
    model = prepare(objective.model, settings).train()
    FrozenParts(model)
    batch = objective.collate([objective.train[i] for i in range(2)])
    assert any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))
    seen: dict[str, bool] = {}
    tower = model.model.image_tower
    tower.register_forward_hook(lambda module, args, output: seen.update(grad=output.grid.requires_grad))
    first, second = model(**batch).loss, model(**batch).loss
    assert torch.equal(first, second)  # dropout would show
    assert seen == {"grad": False}  # nothing of it is recorded, so there is nothing to go back through
    assert not tower.training
    assert not any(module.training for module in tower.modules())
    assert model.training
    assert model.model.image_projector.training
    first.backward()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None} == {"image_projector"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["image_tower", "vision"], r"match no parameter: \['vision'\]; the names begin with model.image_tower, model"),
        ([""], "leave nothing to train"),
    ],
)
def test_freezing_by_patterns_is_strict(checkpoint: Path, patterns: list[str], message: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    with pytest.raises(RecipeError, match=message):
        freeze(model, patterns)


PROMPT = "how bright is it"


@pytest.fixture(scope="module")
def with_adapters(checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of adapters that have been trained for the checkpoint."""
    pytest.importorskip("peft")
    data = {part: {"path": str(pictures / part), "prompt": PROMPT} for part in ("train", "test")}
    model, output = {"checkpoint": str(checkpoint)}, tmp_path_factory.mktemp("adapters")
    settings = recipe("lora", output, model=model, train=data["train"], evaluate=data["test"])
    run(settings)
    return settings


@pytest.fixture
def adapters(with_adapters: Recipe, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(with_adapters.output, tmp_path / "adapters"))


def test_adapters_are_trained_saved_loaded_and_merged(with_adapters: Recipe, tmp_path: Path) -> None:
    import peft

    settings, folder = with_adapters, Path(with_adapters.output)
    assert not (folder / "model.safetensors").exists()
    objective = OBJECTIVES["answers"](settings)
    batch = objective.collate([objective.train[i] for i in (0, 5)])
    batch["pixel_values"] = Normalization(objective.processor.image_processor)(batch["pixel_values"])
    base = objective.model.eval()
    with torch.no_grad():
        before = base(**batch).logits
        adapted = peft.PeftModel.from_pretrained(base, folder).eval()
        after = adapted(**batch).logits
        merged = adapted.merge_and_unload()(**batch).logits
        reloaded = AutoModelForImageTextToText.from_pretrained(folder).eval()(**batch).logits
        asked, _ = load(folder)
        answering = asked(**batch).logits
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, merged, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after, reloaded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(merged, answering, atol=0, rtol=0)
    assert asked.config.name_or_path == str(folder)
    assert asked.state_dict().keys() == load(settings.model.checkpoint)[0].state_dict().keys()
    assert not any(module.training for module in asked.modules())
    # the recipe trains the embedding, which is the head too
    assert asked.lm_head.weight is asked.get_input_embeddings().weight
    assert not torch.equal(asked.lm_head.weight, load(settings.model.checkpoint)[0].lm_head.weight)
    asked.save_pretrained(tmp_path)
    with torch.no_grad():
        saved = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()(**batch).logits
    torch.testing.assert_close(saved, answering, atol=1e-6, rtol=1e-4)


def test_adapters_are_evaluated_like_any_checkpoint(adapters: Path, checkpoint: Path, pictures: Path) -> None:
    settings = choose_settings(adapters, data=str(pictures / "test"), prompt=PROMPT)
    outcome = evaluate(adapters, settings)
    model, processor = load(adapters)
    with Image.open(pictures / "test" / "bright" / "0.png") as picture:
        assert outcome.asked[0].answer == answer(model, processor, [picture], PROMPT).answer
    weights = outcome.result.hashes.weights
    assert weights == hash_weights(adapters) != hash_weights(checkpoint)
    tensors = load_file(adapters / "adapter_model.safetensors")
    next(iter(tensors.values())).add_(1)
    save_file(tensors, adapters / "adapter_model.safetensors")
    assert hash_weights(adapters) != weights
    shutil.copytree(checkpoint, adapters.parent / "base")
    settle(adapters, base_model_name_or_path=str(adapters.parent / "base"))
    before = hash_weights(adapters)
    base = load_file(adapters.parent / "base" / "model.safetensors")
    next(iter(base.values())).add_(1)
    save_file(base, adapters.parent / "base" / "model.safetensors")
    assert hash_weights(adapters) != before


def settle(adapters: Path, **changes: Any) -> None:
    values = json.loads((adapters / "adapter_config.json").read_text()) | changes
    (adapters / "adapter_config.json").write_text(json.dumps(values))
    reseal(adapters)


def test_adapters_know_the_weights_that_they_were_trained_for(adapters: Path, checkpoint: Path) -> None:
    """The same shapes and names everywhere: without a fingerprint they would load, and answer nonsense."""
    other = adapters.parent / "retrained"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(other)
    settle(adapters, base_model_name_or_path=str(other))
    with pytest.raises(CheckpointError, match="trained for other weights of language_model than those in"):
        load(adapters)
    moved = shutil.copytree(checkpoint, adapters.parent / "moved")
    settle(adapters, base_model_name_or_path=str(moved))
    load(adapters)


def test_adapters_that_cannot_be_loaded_say_why(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, file = load_file(adapters / "adapter_model.safetensors"), adapters / "adapter_model.safetensors"
    first = next(name for name in weights if "lora_A" in name)
    for changed in ({name: weights[name] for name in weights if name != first}, {**weights, "stray": torch.ones(1)}):
        save_file(changed, file)
        reseal(adapters)
        with pytest.raises(CheckpointError, match=f"missing or unexpected: ({re.escape(first)}|stray)"):
            load(adapters)
    save_file({**weights, first: weights[first][:1].contiguous()}, file)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is damaged or changed"):
        load(adapters)
    reseal(adapters)
    with pytest.raises(CheckpointError, match="size mismatch"):
        load(adapters)
    file.write_bytes(file.read_bytes()[:100])
    reseal(adapters)
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        load(adapters)
    file.unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is missing"):
        load(adapters)
    reseal(adapters)
    with pytest.raises(CheckpointError, match="No such file"):
        load(adapters)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)  # as if it were not installed
        with pytest.raises(CheckpointError, match="holds adapters, for which peft is needed: pip install"):
            load(adapters)
    settle(adapters, base_model_name_or_path="gone")
    for use in (load, choose_settings, hash_weights):
        with pytest.raises(
            CheckpointError, match="were trained for the model 'gone', which is not there in '.*'; put it back"
        ):
            use(adapters)


def test_adapters_need_a_model_that_can_be_loaded_again(tmp_path: Path) -> None:
    fresh = {"thinker": "configs/thinker_tiny.json", "image": {"encoder": "checkpoints/vision_tiny"}}
    for model in (fresh, {"checkpoint": "checkpoints/omni_tiny", "image": {"projector": "mlp"}}):
        with pytest.raises(ValueError, match="`lora` leaves adapters alone.* give a `checkpoint`, and no `image`"):
            recipe("lora", tmp_path, model=model)


def test_adapters_that_fit_nowhere_are_refused(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = recipe(
        "lora",
        tmp_path,
        model={"checkpoint": str(checkpoint)},
        train={"path": str(pictures / "train")},
        evaluate=None,
        lora={"target_modules": ".*qkv_proj"},
    )
    with pytest.raises(RecipeError, match="does not fit the model: Target modules .*qkv_proj"):
        run(settings)


def test_a_run_is_resumed_on_the_rows_that_it_began_with(checkpoint: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    names = [f"{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        Image.new("RGB", (24, 24), (60 * i, 0, 0)).save(data / name)

    def describe(answer: str) -> None:
        rows = [json.dumps({"file_name": name, "text": answer}) + "\n" for name in names]
        (data / "metadata.jsonl").write_text("".join(rows))

    def go(resume: bool) -> Path:
        section, files = {"checkpoint": str(checkpoint)}, {"path": str(data)}
        return run(
            recipe(
                "pictures", out, {"save_strategy": "steps", "save_steps": 1}, model=section, train=files, evaluate=files
            ),
            resume,
        )

    describe("red")
    expected = weights(go(False))
    last = max((out / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    describe("blue")
    with pytest.raises(
        RecipeError, match="The files of `evaluate` and `train` in the recipe have changed since the run in"
    ):
        go(True)
    describe("red")
    found = weights(go(True))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_own_pictures_are_learnt(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    data = {part: {"path": str(pictures / part), "prompt": "how bright is it"} for part in ("train", "test")}
    arguments = {"max_steps": 80, "eval_strategy": "steps", "eval_steps": 80, "per_device_train_batch_size": 8}
    settings = recipe(
        "pictures",
        tmp_path,
        arguments,
        model={"checkpoint": str(checkpoint)},
        train=data["train"],
        evaluate=data["test"],
        optimizer={"name": "muon", "lr": 0.01},
    )
    folder = run(settings)
    history = json.loads((folder / "run" / "history.json").read_text())
    assert next(entry["eval_exact_match"] for entry in history if "eval_exact_match" in entry) == 1.0
    with Image.open(folder / "run" / "curves.png") as curves:
        curves.load()
        assert min(curves.size) > 400
        assert len(curves.convert("L").resize((64, 64)).getcolors() or []) > 3


def test_the_score_of_answers_stands_beside_that_of_the_best_constant() -> None:
    labels = np.full((3, 6), -100)
    labels[0, 1:3], labels[0, 4:5] = (5, 6), (7,)  # two answers, one about each question
    labels[1, 2:4] = 5, 6
    labels[2, 1:2] = 9
    right = np.where(labels == -100, -100, 1)
    right[1, 3] = 0
    scores = AnswerTraining.metrics(None, EvalPrediction(right, labels))  # type: ignore[arg-type]
    assert scores == {"exact_match": 3 / 4, "best_constant": 2 / 4}


def test_what_may_be_forgotten_is_told(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    own = {"path": str(pictures / "train")}

    def objective(train: dict[str, Any], **changes: Any) -> None:
        model = {"checkpoint": str(checkpoint)}
        OBJECTIVES["answers"](recipe("pictures", tmp_path, model=model, train=train, evaluate=None, **changes))

    with pytest.warns(UserWarning, match="may be forgotten; to keep them, mix in rows"):
        objective(own)
    mixed = {"sources": [{"data": own}, {"data": {"count": 4}}]}
    with warnings.catch_warnings(action="error"):
        objective(mixed)
        objective(own, freeze=["tower", "language_model"])


def test_contrastive_alignment_learns_the_loss_that_it_says(tmp_path: Path, tiny_encoder: dict[str, Any]) -> None:
    section = json.loads((CONFIGS / "train_contrastive.json").read_text())["model"]
    text = section["text"] | {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    model = {"config": tiny_encoder, "text": text, "vocab_size": 400, "projection_dim": 16}
    settings = recipe("contrastive", tmp_path, model=model)
    objective = ContrastiveAlignment(settings)
    batch = objective.collate([objective.train[i] for i in range(5)])
    found = objective.model.eval()(**batch)
    images, texts = found.image_embeds, found.text_embeds
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(5))
    scale = objective.model.logit_scale.exp()
    assert objective.model.logit_scale.requires_grad
    logits = torch.stack([torch.stack([scale * (i @ t) for t in texts]) for i in images])
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(found.loss, expected)
    examples = [objective.train[i] for i in range(5)]
    examples[3] = examples[3][0], examples[1][1]  # another picture with a caption that is there already
    found = objective.model(**objective.collate(examples))
    pairs = [[j for j in range(5) if j == i or {i, j} != {1, 3}] for i in range(5)]
    logits = scale * found.text_embeds @ found.image_embeds.T
    rows = [-table[i, i] + torch.logsumexp(table[i, pairs[i]], 0) for table in (logits, logits.T) for i in range(5)]
    torch.testing.assert_close(found.loss, torch.stack(rows).mean())
    folder = run(recipe("contrastive", tmp_path, {"eval_strategy": "steps", "eval_steps": 3}, model=model))
    assert type(AutoModel.from_pretrained(folder)).__name__ == "OmniVisionModel"
    history = json.loads((folder / "run" / "history.json").read_text())
    evaluated = next(entry for entry in history if "eval_text_of_image_at_5" in entry)
    assert {entry for entry in evaluated if "_at_" in entry} == {
        f"eval_{name}_at_{k}" for name in ("text_of_image", "image_of_text") for k in (1, 5)
    }


def test_contrastive_alignment_needs_captions_that_differ(pictures: Path, tmp_path: Path) -> None:
    rows = [{"image": str(path), "caption": "a scene"} for path in sorted((pictures / "train").rglob("*.png"))]
    (alike := tmp_path / "alike.json").write_text(json.dumps(rows))
    with pytest.raises(
        ExampleError, match="pictures have the caption 'a scene', but the contrastive loss needs captions"
    ):
        ContrastiveAlignment(recipe("contrastive", tmp_path, train={"path": str(alike)}))


def test_recall_counts_what_stands_before_the_right_one() -> None:
    images = np.eye(6)
    texts = np.eye(6)
    texts[[0, 1]] = texts[[1, 0]]  # two captions exchanged
    scores = ContrastiveAlignment.metrics(None, EvalPrediction(np.stack([images, texts], 1), None))  # type: ignore[arg-type]
    assert scores == pytest.approx(
        {"text_of_image_at_1": 4 / 6, "text_of_image_at_5": 1.0, "image_of_text_at_1": 4 / 6, "image_of_text_at_5": 1.0}
    )


def test_dense_pretraining_needs_scenes(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs to know what covers each patch"):
        recipe("vision_tiny", tmp_path, train={"path": str(pictures)})

"""Recipes are strict, training learns, and a run that was interrupted ends where an uninterrupted one does."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, TrainingArguments

import omni
from omni.embedding.engine import bfloat16_pays
from omni.fusion.acceleration import Acceleration, using
from omni.training.optimizer import Muon, MuonAdamW, make_optimizer
from omni.training.parts import CHECKPOINTING
from omni.training.recipe import Recipe, RecipeError
from omni.training.run import run, settle
from omni.training.sections import Optimizer

CONFIGS = Path(__file__).parents[2] / "configs"
TINY_ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "hidden_dropout_prob": 0.0}
ARGUMENTS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "dataloader_num_workers": 0,
    "eval_strategy": "no",
    "save_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "remove_unused_columns": False,
}


def tiny(name: str, folder: Path, **changes: Any) -> Recipe:
    """The shipped recipe of that name, with tiny models, few steps and its output in `folder`."""
    recipe = json.loads((CONFIGS / f"train_{name}.json").read_text())
    recipe["arguments"] = {key: value for key, value in recipe["arguments"].items() if key == "seed"} | ARGUMENTS
    recipe["train"]["count"], recipe["evaluate"]["count"] = 16, 4
    recipe["output"] = str(folder)
    recipe.update(changes)
    return Recipe.model_validate(recipe)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny("vision_tiny", tmp_path_factory.mktemp("encoder"), model={"config": TINY_ENCODER}))


def test_every_shipped_recipe_is_valid() -> None:
    recipes = sorted(CONFIGS.glob("train_*.json"))
    assert recipes
    for path in recipes:
        about = Recipe.read(path).about
        assert about is not None
        assert about.makes


def test_recipe_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    path = CONFIGS / "train_vision_tiny.json"
    with pytest.raises(ValueError, match="lerning_rate"):
        Recipe.read(path, ["optimizer.lerning_rate=0.1"])
    with pytest.raises(ValueError, match="unknown 'enkoder'; what can be set here is"):
        Recipe.read(path, ["model.enkoder=runs"])
    with pytest.raises(ValueError, match="either `checkpoint`, or `thinker`"):
        Recipe.read(CONFIGS / "train_omni_scenes.json", ["model.checkpoint=checkpoints/omni_tiny"])
    with pytest.raises(ValueError, match="`bf16` is true, false or \"auto\", found 'Auto'"):
        Recipe.read(path, ["arguments.bf16=Auto"])
    with pytest.raises(ValueError, match="no section 'optimiser'"):
        Recipe.read(path, ["optimiser.lr=0.1"])
    with pytest.raises(ValueError, match="key=value"):
        Recipe.read(path, ["optimizer.lr"])
    assert Recipe.read(path, ["optimizer.lr=0.25", "output=elsewhere"]).optimizer.lr == 0.25
    assert Recipe.read(path, ["output=elsewhere"]).output == "elsewhere"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arguments.max_steps=abc", "`max_steps` cannot be 'abc': Input should be a valid integer"),
        ("arguments.max_steps=4.5", "`max_steps` cannot be 4.5"),
        ("arguments.max_steps=0", "`max_steps` should be at least 1, found 0"),
        ("arguments.num_train_epochs=0", "`num_train_epochs` should be more than 0"),
        ("arguments.per_device_train_batch_size=0", "`per_device_train_batch_size` should be at least 1"),
        ("arguments.use_cpu=yes", "`use_cpu` cannot be 'yes'"),
        ("arguments.save_only_model=true", "`save_only_model` leaves out what a run is resumed from"),
        ('freeze=["("]', r"freeze.0: '\(' is no regular expression \(missing \)"),
        ('optimizer.lr_scale={"[": 0.1}', r"'\[' is no regular expression"),
        ('optimizer.lr_scale={"norm": -1}', "greater than or equal to 0"),
        ("optimizer.lr=Infinity", "optimizer.lr: Input should be a finite number"),
        ("optimizer.lr=1e39", "optimizer.lr: Input should be less than or equal to 10"),
        ("arguments.seed=-1", "`seed` should be at least 0, found -1"),
        ("arguments.seed=4294967296", "`seed` should be at most 4294967295"),
        ("arguments.data_seed=18446744073709551616", "`data_seed` should be at most 4294967295"),
        ("arguments.warmup_steps=NaN", "`warmup_steps` should be a finite number, found nan"),
        ("arguments.logging_steps=-1", "`logging_steps` should be at least 0, found -1"),
        ("arguments.save_total_limit=-1", "`save_total_limit` should be at least 1, found -1"),
        ("arguments.dataloader_num_workers=100000000", "`dataloader_num_workers` should be at most 1024"),
        ("arguments.label_smoothing_factor=0.1", "`label_smoothing_factor` has no meaning here"),
        ('train={"count": 1, "min_objects": 4, "max_objects": 3}', "`min_objects` is 4, more than `max_objects`, 3"),
        ('train={"count": 1, "kinds": {"nope": 1}}', "unknown 'nope' in `kinds`; known: shape"),
        ('train={"count": 1, "kinds": {"shape": 0}}', "`kinds` has no kind with a weight above 0"),
        ('train={"count": 100000000000000000000}', "less than or equal to"),
        ('output=""', "output: String should have at least 1 character"),
        ('output="\\ud800"', "holds text that is not valid Unicode"),
    ],
)
def test_values_are_checked_before_anything_is_done(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.read(CONFIGS / "train_pictures.json", [override])


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_either_name_of_checkpointing_is_that_of_the_installed_transformers(name: str) -> None:
    recipe = Recipe.read(CONFIGS / "train_pictures.json", [f"arguments.{name}=true"])
    assert recipe.arguments[CHECKPOINTING] is True
    assert TrainingArguments(use_cpu=True, **{CHECKPOINTING: recipe.arguments[CHECKPOINTING]})
    both = ["arguments.activation_checkpointing=true", "arguments.gradient_checkpointing=true"]
    with pytest.raises(RecipeError, match="given twice, also as '(activation|gradient)_checkpointing'; give it once"):
        Recipe.read(CONFIGS / "train_pictures.json", both)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr_scheduler_type", "liner"),
        ("lr_scheduler_type", "warmup_stable_decay"),
        ("lr_scheduler_kwargs", {"unknown": 1}),
        ("save_strategy", "sometimes"),
        ("dataloader_prefetch_factor", 4),
    ],
)
def test_what_transformers_refuses_is_told_as_a_mistake_of_the_recipe(name: str, value: Any, tmp_path: Path) -> None:
    changed = tiny("vision_tiny", tmp_path, model={"config": TINY_ENCODER}, arguments={**ARGUMENTS, name: value})
    with pytest.raises(RecipeError, match="Correct `arguments` or `output` of the recipe, which cannot be used: "):
        run(changed)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("name", "reason"), [("file/out", "Not a directory"), ("x" * 5000, "File name too long")])
def test_an_invalid_output_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=f"Correct `arguments` or `output` of the recipe.*{reason}"):
        run(tiny("vision_tiny", tmp_path / name, model={"config": TINY_ENCODER}))


def test_encoder_recipe_writes_a_checkpoint_that_loads(encoder: Path) -> None:
    model = AutoModel.from_pretrained(encoder)
    assert type(model) is omni.OmniVisionModel
    assert model.config.hidden_size == 32


def test_answer_recipe_writes_a_checkpoint_that_answers(
    encoder: Path, tmp_path: Path, tiny_thinker: dict[str, Any]
) -> None:
    thinker = tmp_path / "thinker.json"
    thinker.write_text(json.dumps(tiny_thinker))
    image = {"encoder": str(encoder), "output": "cls+grid", "projector": "unshuffle_mlp", "factor": 2}
    section = {"thinker": str(thinker), "vocab_size": 400, "image": image}
    folder = run(tiny("omni_scenes", tmp_path / "out", model=section))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    trained, original = model.model.image_tower.state_dict(), AutoModel.from_pretrained(encoder).state_dict()
    assert trained.keys() == original.keys()
    assert not torch.equal(trained["norm.weight"], original["norm.weight"])  # it learnt along
    chat = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    # nothing of how it was trained or loaded stays in it
    assert "use_cache" not in json.loads((folder / "config.json").read_text())
    processor.save_pretrained(tmp_path / "again")
    saved, again = ((where / "tokenizer_config.json").read_text() for where in (folder, tmp_path / "again"))
    assert saved == again


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    straight = run(tiny("vision_tiny", tmp_path / "straight", model={"config": TINY_ENCODER}))
    assert not list((straight / "run").glob(".*"))  # nothing half-written is left
    run(tiny("vision_tiny", tmp_path / "cut", model={"config": TINY_ENCODER}))
    # as if killed after step 2: nothing newer is left
    shutil.rmtree(tmp_path / "cut" / "run" / "checkpoint-4")
    (tmp_path / "cut" / "model.safetensors").unlink()
    resumed = run(tiny("vision_tiny", tmp_path / "cut", model={"config": TINY_ENCODER}), resume=True)
    expected, found = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_bfloat16_is_taken_where_it_is_faster_and_kept_by_a_resumed_run(tmp_path: Path) -> None:
    asked = tiny("vision_tiny", tmp_path, arguments={**ARGUMENTS, "bf16": "auto"})
    fast = bfloat16_pays()
    if not torch.cuda.is_available():
        assert settle(asked).arguments["bf16"] is fast
    begun = settle(asked, tiny("vision_tiny", tmp_path, arguments={**ARGUMENTS, "bf16": not fast}))
    assert begun.arguments == {**ARGUMENTS, "bf16": not fast}
    with pytest.raises(RecipeError, match="other settings of arguments"):
        settle(asked, tiny("vision_tiny", tmp_path, arguments={**ARGUMENTS, "max_steps": 5}))


@pytest.mark.parametrize("bf16", [True, False])
def test_a_model_learns_where_speed_was_asked_about_it(bf16: bool, tmp_path: Path) -> None:
    class Noting(Acceleration):
        asked: list[tuple[str, torch.dtype, bool]] = []

        @contextmanager
        def training(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
            before = [parameter.detach().clone() for parameter in model.parameters()]
            yield
            learnt = any(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
            self.asked.append((device.type, dtype, learnt))

    with using(noting := Noting()):
        few = ARGUMENTS | {"max_steps": 1, "bf16": bf16, "save_strategy": "no"}
        run(tiny("vision_tiny", tmp_path / "out", model={"config": TINY_ENCODER}, arguments=few))
    assert noting.asked == [("cpu", torch.bfloat16 if bf16 else torch.float32, True)]


def test_an_earlier_run_is_not_overwritten(encoder: Path) -> None:
    with pytest.raises(FileExistsError, match="checkpoint-4; resume it"):
        run(tiny("vision_tiny", encoder, model={"config": TINY_ENCODER}))


class Small(nn.Module):
    """A hidden matrix, an embedding, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.hidden = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.heads = nn.ModuleDict({"out": nn.Linear(16, 5)})


def test_muon_takes_the_hidden_matrices_alone_and_vectors_never_decay() -> None:
    model = Small()
    optimizer = make_optimizer(model, Optimizer(lr=0.1, weight_decay=0.5, lr_scale={"^hidden": 0.5}))
    rule = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert rule[id(model.hidden.weight)]["algorithm"] == "muon"
    others = [p for p in model.parameters() if p is not model.hidden.weight]
    assert {rule[id(p)]["algorithm"] for p in others} == {"adamw"}
    assert all(rule[id(p)]["weight_decay"] == (0.5 if p.ndim > 1 else 0) for p in model.parameters())
    assert rule[id(model.hidden.bias)]["lr"] == 0.05
    assert rule[id(model.norm.bias)]["lr"] == 0.1


def test_a_pattern_that_matches_nothing_raises() -> None:
    with pytest.raises(ValueError, match=r"match no trainable parameter.*tower"):
        make_optimizer(Small(), Optimizer(lr=0.1, lr_scale={"tower": 0.5}))


def test_muon_update_is_nearly_orthogonal_and_the_rest_is_adamw() -> None:
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8))
    twin = nn.Parameter(vector.detach().clone())
    before = matrix.detach().clone()
    settings = {"lr": 0.1, "weight_decay": 0.0}
    ours = MuonAdamW([{"params": [matrix], **settings}], [{"params": [vector], **settings}])
    reference = torch.optim.AdamW([{"params": [twin], **settings}], betas=(0.9, 0.95))
    matrix.grad, vector.grad = torch.randn(16, 8), torch.randn(8)
    twin.grad = vector.grad.clone()
    ours.step()
    reference.step()
    singular = torch.linalg.svdvals((matrix.detach() - before) / (0.1 * 0.2 * 16**0.5))
    assert singular.min() > 0.6  # Newton-Schulz brings them near 1; those of a random gradient spread by a factor of 5
    assert singular.max() < 1.3
    assert torch.equal(vector, twin)


@pytest.mark.parametrize("shape", [(16, 8), (8, 16), (8, 8)])
def test_muon_steps_as_torchs_does_up_to_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix, twin = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.5}
    ours = Muon([{"params": [matrix], **settings}])
    torchs = torch.optim.Muon([twin], **settings, adjust_lr_fn="match_rms_adamw")
    third = nn.Parameter(torch.ones(shape))
    in_bfloat16 = MuonAdamW(
        [{"params": [third], **settings}], [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.0}], True
    )
    for _ in range(3):
        matrix.grad, before = torch.randn(shape), twin.detach().clone()
        twin.grad, third.grad = matrix.grad.clone(), matrix.grad.clone()
        for optimizer in (ours, torchs, in_bfloat16):
            optimizer.step()
        change = (twin - before).norm()
        for other in (matrix, third):
            assert (other - twin).norm() < 0.02 * change
            other.data.copy_(twin)
    assert ours.state_dict()["state"][0].keys() == torchs.state_dict()["state"][0].keys()


def test_the_optimizer_resumes_from_its_state() -> None:
    def made() -> tuple[list[nn.Parameter], MuonAdamW]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))]
        groups = [[{"params": [p], "lr": 0.1, "weight_decay": 0.1}] for p in parameters]
        return parameters, MuonAdamW(*groups)

    def step(parameters: list[nn.Parameter], optimizer: MuonAdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    parameters, optimizer = made()
    step(parameters, optimizer, 1)
    state, halfway = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters]
    step(parameters, optimizer, 2)
    again, resumed = made()
    for parameter, value in zip(again, halfway, strict=True):
        parameter.data.copy_(value)
    resumed.load_state_dict(state)
    step(again, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))
    resumed.param_groups[1]["lr"] = 0.0  # what a scheduler does must reach the part that uses it
    frozen = again[1].detach().clone()
    step(again, resumed, 3)
    assert torch.equal(again[1], frozen)

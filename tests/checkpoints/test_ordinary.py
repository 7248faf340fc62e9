"""The short way of loading: what it makes is what transformers makes, and whatever is not ordinary does not take it."""

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
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS, guard_torch_init_functions, no_tie_weights

from omni import OmniForConditionalGeneration, OmniModel, OmniVisionConfig, OmniVisionModel
from omni.checkpoints import strict as loading
from omni.checkpoints.ordinary import nothing_drawn


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


SMALL = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


class Recurrent(OmniVisionModel):
    """Its module keeps its weights in a list as well; and it has a buffer that is saved and one that is not."""

    def __init__(self, config: OmniVisionConfig) -> None:
        super().__init__(config)
        self.recurrent = torch.nn.GRU(4, 3, batch_first=True)
        self.register_buffer("saved", torch.zeros(2))
        self.register_buffer("computed", torch.arange(3.0), persistent=False)


def test_weights_that_a_module_has_in_two_places(tmp_path: Path, loaded_ordinarily: list[bool]) -> None:
    model = Recurrent(OmniVisionConfig(**SMALL)).eval()
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
    encoder: Any, saved: dict[str, Path], tmp_path: Path, loaded_ordinarily: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    OmniForConditionalGeneration.from_pretrained(saved["fused-shards"])
    copy.deepcopy(encoder).bfloat16().save_pretrained(tmp_path / "half")
    assert OmniVisionModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    shutil.copytree(saved["encoder-file"], tmp_path / "of others")
    config = json.loads((tmp_path / "of others/config.json").read_text())
    (tmp_path / "of others/config.json").write_text(json.dumps({**config, "fingerprints": None}))
    OmniVisionModel.from_pretrained(tmp_path / "of others")
    monkeypatch.setattr("omni.checkpoints.ordinary.SMALL", 1000)
    OmniForConditionalGeneration.from_pretrained(saved["fused-file"])
    assert loaded_ordinarily == [False] * 4


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


# --- Threads ----------------------------------------------------------------------------------------------------------


def in_another_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(timeout=60)


def is_drawn(model: OmniVisionModel) -> bool:
    """Whether its weights are as they should be in the beginning."""
    weight = model.layers[0].attention.qkv.weight
    return bool(model.layers[0].norm1.weight.eq(1).all()) and 0.01 < float(weight.detach().std()) < 0.03


def originals() -> list[Any]:
    names = ("init_weights", "tie_weights")
    return [*map(torch.nn.init.__dict__.get, TORCH_INIT_FUNCTIONS), *(getattr(PreTrainedModel, name) for name in names)]


def test_nothing_is_drawn_in_this_thread_alone() -> None:
    before, random = originals(), torch.get_rng_state()
    with nothing_drawn():
        OmniVisionModel(OmniVisionConfig(**SMALL))
        assert torch.get_rng_state().equal(random)
        with nothing_drawn():
            pass
        torch.nn.Linear(4, 4)
        assert torch.get_rng_state().equal(random)
        assert in_another_thread(lambda: is_drawn(OmniVisionModel(OmniVisionConfig(**SMALL))))
    assert originals() == before
    assert is_drawn(OmniVisionModel(OmniVisionConfig(**SMALL)))


@pytest.mark.parametrize("other", [guard_torch_init_functions, nothing_drawn])
def test_whoever_overlaps_leaves_nothing_behind_that_does_not_draw(other: Any) -> None:
    """Each puts back what it has found; the one that came second found what the first one had put there."""
    first, second, before = nothing_drawn(), other(), originals()
    try:
        first.__enter__()
        in_another_thread(second.__enter__)
        first.__exit__(None, None, None)
        in_another_thread(lambda: second.__exit__(None, None, None))
        torch.manual_seed(0)
        weight = torch.nn.Linear(64, 64).weight
        torch.manual_seed(0)
        assert weight.equal(torch.nn.init._no_grad_uniform_(torch.empty(64, 64), -0.125, 0.125))
        with nothing_drawn():
            pass
        assert originals() == before
    finally:
        for name, function in TORCH_INIT_FUNCTIONS.items():
            setattr(torch.nn.init, name, function)


def test_models_are_loaded_in_several_threads(make_model: Callable[..., Any], encoder: Any, tmp_path: Path) -> None:
    """A short way and transformers', tied weights and another type, which all of transformers' patches would mix up."""
    fused, before = make_model(text={"tie_word_embeddings": True}), originals()
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
    assert is_drawn(OmniVisionModel(OmniVisionConfig(**SMALL)))


def test_weights_that_another_thread_keeps_from_being_tied(
    make_model: Callable[..., Any], tmp_path: Path, loaded_ordinarily: list[bool]
) -> None:
    make_model(text={"tie_word_embeddings": True}).save_pretrained(tmp_path)
    with no_tie_weights(), pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        OmniForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded_ordinarily == [False]

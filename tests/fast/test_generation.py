"""Generation's quick ways give what the model's own way gives, and step aside where they do not know a model."""

import copy
import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from omni import OmniForConditionalGeneration
from omni.fast.cache import RoomyLayer, give_room
from omni.fast.compiled_layers import CompiledLayers, Dimensions
from omni.fast.generation import quick_step, stepping
from omni.fast.quick_step import ACTIVATIONS, Layer, QuickStep
from omni.fusion.acceleration import Acceleration, using

Make = Callable[..., OmniForConditionalGeneration]
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64, "rms_norm_eps": 1e-5}
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "llama with llama3 positions": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16},
}


def thinker(kind: str, **changes: Any) -> Any:
    """With weights that are large enough for every part to matter, norms' included."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split()[0], **SIZE, **KNOWN.get(kind, {}) | changes)
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.8)
    return model


# --- The step ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "not compiled"])
@pytest.mark.parametrize("rows", [1, 3, 15, 20])
@pytest.mark.parametrize("kind", KNOWN)
def test_a_step_is_the_models_own(kind: str, rows: int, compiled: bool, compiles: bool) -> None:
    model, length = thinker(kind), 9
    embeds = torch.randn(rows, length, 32)
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, : row % 5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    cache = give_room(DynamicCache(config=model.config))
    model(inputs_embeds=embeds[:, :4], attention_mask=mask[:, :4], position_ids=positions[:, :4], past_key_values=cache)
    with stepping(model):
        step = quick_step(model, cache, embeds, None, {})
        assert step is not None
        assert (step.compiled is not None) == compiles
        step.compiled = step.compiled if compiled else None
        for start, stop in ((4, 5), (5, 8), (8, 9)):
            part, seen = embeds[:, start:stop], mask[:, :stop]
            found = step(part, seen, positions[:, start:stop], cache)
            close(found, expected[:, start:stop], mask[:, start:stop])
        anew = give_room(DynamicCache(config=model.config))
        close(step(embeds, mask, positions, anew), expected, mask)
        assert all(layer.keys.isfinite().all() for layer in anew.layers)  # of padding too: others would get NaN from it
        if rows == 1:
            close(step(embeds, None, None, give_room(DynamicCache(config=model.config))), expected, mask)


@torch.no_grad()
def test_a_compiled_step_reads_the_weights_where_they_are(compiles: bool) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    model = thinker("qwen3")
    embeds, mask = torch.randn(2, 3, 32), torch.ones(2, 3, dtype=torch.int64)

    def step() -> torch.Tensor:
        with stepping(model):
            cache = give_room(DynamicCache(config=model.config))
            known = quick_step(model, cache, embeds, None, {})
            assert known is not None
            assert known.compiled is not None
            return known(embeds, None, None, cache)

    def own() -> torch.Tensor:
        return model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state

    close(step(), own(), mask)
    model.layers[1].mlp.up_proj.weight.mul_(-0.5)
    close(step(), own(), mask)
    model.layers[0].self_attn.q_norm.weight = nn.Parameter(torch.randn(16))
    close(step(), own(), mask)
    model.norm.weight = nn.Parameter(torch.randn(64)[::2])  # not one number after the other
    close(step(), own(), mask)
    model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.randn(48, 16))  # of another shape: torch refuses it
    with pytest.raises(RuntimeError):
        step()


@torch.no_grad()
@pytest.mark.parametrize("part", ["mlp.up_proj", "self_attn.k_proj", "input_layernorm"])
def test_layers_that_are_not_like_the_first_are_not_compiled(part: str) -> None:
    """Whoever cuts layers may have cut some of them more: machine code has one shape for all."""
    model = thinker("llama")
    known = CompiledLayers(
        [[part for part in Layer.of(layer) if not isinstance(part, ACTIVATIONS)] for layer in model.layers],
        model.norm,
        Dimensions(32, 48, 2, 1, 16, 1e-5, 0.0, 0.25),
    )
    assert known.weights() is not None
    weight = model.layers[1].get_submodule(part).weight
    for other in (weight[: len(weight) // 2], weight.double(), weight.to("meta"), weight.repeat_interleave(2, 0)[::2]):
        model.layers[1].get_submodule(part).weight = nn.Parameter(other.detach())
        assert known.weights() is None
    model.layers[1].get_submodule(part).weight = None
    assert known.weights() is None


@torch.no_grad()
def test_weights_stay_in_memory_while_they_are_read(compiles: bool) -> None:
    """Another thread may exchange them in the middle of a step; to read freed memory would end the process."""
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    model = thinker("llama")
    with stepping(model):
        step = quick_step(model, give_room(DynamicCache(config=model.config)), torch.randn(1, 1, 32), None, {})
        assert step is not None
        assert step.compiled is not None
        reading = step.compiled.weights()
        assert reading is step.compiled.weights()
        before, weight = reading.pointers[1], model.layers[0].self_attn.q_proj.weight
        assert weight.data_ptr() == before
        memory = weight.untyped_storage()._weak_ref()
        weight.data = weight.data.clone()
        assert not torch.UntypedStorage._expired(memory)
        assert step.compiled.weights().pointers[1] == weight.data_ptr() != before
        assert not torch.UntypedStorage._expired(memory)  # the step that began with them goes on
        del reading
        assert torch.UntypedStorage._expired(memory)
        weight.untyped_storage().resize_(0)
        assert step.compiled.weights() is None
    assert step.compiled._last is None


@torch.no_grad()
def test_no_other_thread_runs_between_a_weight_and_its_hold(compiles: bool) -> None:
    """An operation of torch gives up Python's lock, so another thread could free the memory that is about to be held."""
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    model = thinker("llama")
    with stepping(model):
        step = quick_step(model, give_room(DynamicCache(config=model.config)), torch.randn(1, 1, 32), None, {})
        assert step is not None
        assert step.compiled is not None
        step.compiled.release()
        with profile(activities=[ProfilerActivity.CPU]) as operations:
            assert step.compiled.weights() is not None
    assert [event.name for event in operations.events() if event.name.startswith("aten::")] == []


@torch.no_grad()
def test_a_compiled_step_refuses_what_is_not_as_it_says(compiles: bool) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    model = thinker("llama")
    with stepping(model):
        step = quick_step(model, give_room(DynamicCache(config=model.config)), torch.randn(1, 1, 32), None, {})
    assert step is not None
    assert step.compiled is not None
    hidden, angles = torch.randn(2, 3, 32), torch.randn(2, 3, 16)
    caches, seen = [torch.zeros(2, 1, 9, 16) for _ in range(6)], torch.ones(2, 5, dtype=torch.bool)
    plain: dict[str, Any] = {
        "hidden": hidden,
        "seen": seen,
        "cosines": angles,
        "sines": angles,
        "caches": caches,
        "held": 2,
    }
    assert step.compiled(step.compiled.weights(), **plain).isfinite().all()
    for changes in (
        {"hidden": hidden.double()},
        {"hidden": hidden[..., :16]},
        {"hidden": torch.randn(50, 3, 32)},
        {"hidden": hidden[:0]},
        {"cosines": angles[..., :8]},
        {"sines": angles.bfloat16()},
        {"seen": seen[:, :4]},
        {"seen": seen.long()},
        {"caches": caches[:4]},
        {"caches": [*caches[:5], caches[5][:, :, :8]]},
        {"caches": [each.transpose(2, 3).contiguous().transpose(2, 3) for each in caches]},
        {"caches": [each[:, :, :4].contiguous() for each in caches]},
        {"held": 7},
    ):
        with pytest.raises((BufferError, ValueError)):
            step.compiled(step.compiled.weights(), **plain | changes)


@torch.no_grad()
def test_a_compiled_step_is_the_same_on_every_number_of_threads(compiles: bool) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    model, before, found = thinker("qwen3"), torch.get_num_threads(), []
    embeds = torch.randn(3, 4, 32)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            with stepping(model):
                cache = give_room(DynamicCache(config=model.config))
                step = quick_step(model, cache, embeds, None, {})
                assert step is not None
                found.append(step(embeds, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def close(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)


def lora(model: Any) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(target_modules=["v_proj"]), model)


def hooked(model: Any) -> Any:
    model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    return model


def patched(model: Any) -> Any:
    model.layers[1].mlp.forward = lambda x: x
    return model


def other_scale(model: Any) -> Any:
    """Plain modules of a known class, and yet another computation: only the trial can tell."""
    model.norm.__class__ = type(
        "Other", (type(model.norm),), {"forward": lambda self, x: 1.01 * super(type(self), self).forward(x)}
    )
    return model


CHANGED: dict[str, Callable[[], Any]] = {
    "adapters": lambda: lora(thinker("llama")),
    "a hook": lambda: hooked(thinker("llama")),
    "a replaced forward": lambda: patched(thinker("llama")),
    "half precision": lambda: thinker("llama").bfloat16(),
    "sliding windows": lambda: thinker("mistral", sliding_window=4),
    "attention maps": lambda: thinker("llama", output_attentions=True, attn_implementation="eager"),
    "another architecture": lambda: thinker("olmo2", num_attention_heads=4),
    "another computation": lambda: other_scale(thinker("llama")),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_what_is_not_known_goes_its_own_way(changed: str) -> None:
    model = CHANGED[changed]()
    cache = DynamicCache(config=model.config)
    for number in range(model.config.num_hidden_layers):
        cache.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), number)
    with torch.no_grad(), stepping(model):
        assert quick_step(model, cache, torch.randn(1, 1, 32), None, {}) is None


def test_when_a_pass_is_not_one_step() -> None:
    model = thinker("llama")
    cache = give_room(DynamicCache(config=model.config))
    token = torch.randn(1, 1, 32)
    with torch.no_grad(), stepping(model):
        assert quick_step(model, cache, token, None, {}) is not None
        model(inputs_embeds=torch.randn(1, 3, 32), past_key_values=cache)
        assert quick_step(model, cache, token, None, {}) is not None
        assert quick_step(model, cache, token.bfloat16(), None, {}) is None
        assert quick_step(model, cache, token, None, {"output_attentions": True}) is None
        assert (
            quick_step(model, cache, token, torch.ones(1, 1, 1, 4), {}) is None
        )  # who sees what, in a form of its own
        with torch.autocast("cpu"):
            assert quick_step(model, cache, token, None, {}) is None
        assert quick_step(thinker("llama"), cache, token, None, {}) is None  # another model, such as one that drafts
        with torch.enable_grad():
            assert quick_step(model, cache, token, None, {}) is None
    with torch.no_grad():
        assert quick_step(model, cache, token, None, {}) is None  # nobody generates
        with stepping(model.train()):
            assert quick_step(model, cache, token, None, {}) is None


@pytest.mark.parametrize("change", [hooked, patched, lora, lambda model: model.register_forward_hook(print)])
def test_a_model_that_changes_after_it_was_known(change: Callable[[Any], Any]) -> None:
    model = thinker("llama")
    for known in (True, False):
        with torch.no_grad(), stepping(model):
            step = quick_step(model, give_room(DynamicCache(config=model.config)), torch.randn(1, 1, 32), None, {})
        assert (step is not None) == known
        change(model)


@pytest.mark.parametrize("part", ["norm", "rotary_emb", "layers", "layers.0.self_attn.q_norm"])
def test_a_part_that_was_replaced_is_the_one_that_is_used(part: str) -> None:
    model = thinker("qwen3")
    with torch.no_grad(), stepping(model):
        step = quick_step(model, give_room(DynamicCache(config=model.config)), torch.randn(1, 1, 32), None, {})
    parent, _, name = part.rpartition(".")
    setattr(model.get_submodule(parent), name, copy.deepcopy(model.get_submodule(part)))
    with torch.no_grad(), stepping(model):
        new = quick_step(model, give_room(DynamicCache(config=model.config)), torch.randn(1, 1, 32), None, {})
    assert step is not None
    assert new is not None
    assert new is not step


def test_what_is_known_does_not_keep_a_model_alive() -> None:
    model = thinker("llama")
    with stepping(model):
        pass
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- In generate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every quick step that is taken."""
    taken: list[int] = []
    step = QuickStep.__call__

    def counted(self: Any, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        taken.append(len(hidden))
        return step(self, hidden, *args)

    monkeypatch.setattr(QuickStep, "__call__", counted)
    return taken


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=["greedy", "beams", "sample"]
)
def test_generation_is_that_of_the_own_way(make_model: Make, steps: list[int], options: dict[str, Any]) -> None:
    model = make_model("qwen3", "omni_vision")
    ids = torch.tensor([[0, 0, 3, 3, 3, 3, 3, 7, 9], [5, 6, 3, 3, 3, 3, 3, 8, 11]])
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }

    def write() -> Any:
        torch.manual_seed(1)
        written: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 0, "output_scores": True}
        return model.generate(**inputs, **written, return_dict_in_generate=True, **{"do_sample": False} | options)

    quick = write()
    assert len(steps) >= 11
    assert all(type(layer) is RoomyLayer for layer in quick.past_key_values.layers)
    for parameter in model.parameters():  # trained on in between
        parameter.data.mul_(1.1)
    steps.clear()
    again = write()
    assert steps
    steps.clear()
    with using(Acceleration()):
        own = write()
    assert not steps
    assert torch.equal(own.sequences, again.sequences)
    torch.testing.assert_close(torch.stack(own.scores), torch.stack(again.scores), atol=2e-5, rtol=1e-4)
    assert not torch.equal(torch.stack(own.scores), torch.stack(quick.scores))


def test_a_cache_of_the_callers_own_is_filled(make_model: Make, steps: list[int]) -> None:
    model = make_model("qwen3", "omni_vision")
    cache = DynamicCache(config=model.config.text_config)
    model.generate(
        input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=-1
    )
    assert cache.get_seq_length() == 6
    assert len(steps) >= 3


# --- The cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_layer_with_room_holds_what_the_stock_one_holds(seed: int) -> None:
    rng = random.Random(seed)
    roomy, stock = RoomyLayer(), DynamicLayer()
    kept: list[tuple[Any, torch.Tensor]] = []
    for change in rng.choices(
        ["update", "crop", "reorder_cache", "batch_repeat_interleave", "copy", "reset"], [6, 2, 1, 1, 2, 0.3], k=14
    ):
        length = stock.get_seq_length()
        if change == "update":
            shape = (len(stock.keys) if length else 2, 3, rng.choice([1, 5, 70]), 4)
            new = [torch.randn(shape) for _ in range(2)]
            with torch.inference_mode() if rng.random() < 0.3 else torch.no_grad():
                for found, expected in zip(roomy.update(*new), stock.update(*new), strict=True):
                    assert torch.equal(found, expected)
        elif length and change == "copy":  # whoever keeps a copy keeps what it held then
            kept.append((copy.deepcopy(roomy), stock.keys.clone()))
        elif length:
            arguments: dict[str, Any] = {
                "crop": -rng.randrange(length),
                "reorder_cache": torch.tensor(rng.sample(range(len(stock.keys)), len(stock.keys))),
                "batch_repeat_interleave": rng.choice([1, 2]) if len(stock.keys) < 8 else 1,
            }
            for layer in (roomy, stock):
                getattr(layer, change)(*[arguments[change]] if change in arguments else ())
        assert roomy.get_seq_length() == stock.get_seq_length()
        assert not stock.get_seq_length() or torch.equal(roomy.values, stock.values)
    for layer, keys in kept:
        assert torch.equal(layer.keys, keys)


def test_gradients_through_a_layer_with_room() -> None:
    layer, keys = RoomyLayer(), torch.randn(1, 2, 3, 4, requires_grad=True)
    first, _ = layer.update(keys, keys)
    second, _ = layer.update(keys * 2, keys)
    (first.square().sum() + second.square().sum()).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(keys.grad, 12 * keys.detach())

"""The fused model: a row's logits and answers are its own, whatever stands beside it and however it was handed in."""

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from omni import OmniConfig, OmniForConditionalGeneration, OmniModel

OLD = Version(transformers.__version__) < Version("5.23")
IMAGE, PAD, TOKENS = 3, 0, 5  # the placeholder's id, the padding's, and how many tokens a picture becomes
Make = Callable[..., OmniForConditionalGeneration]
Row = list[int | torch.Tensor]  # ids of text, and pictures where they stand

# every tower before one Thinker, and every Thinker behind one tower
PAIRS = [
    *(("qwen3", tower) for tower in ("omni_vision", "clip_vision_model", "siglip_vision_model", "dinov2", "vit")),
    *((thinker, "omni_vision") for thinker in ("llama", "gpt2", "gemma", "gemma4_text")),
]
FAMILIES = [
    "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "granite", "cohere", "phi",
    "opt", "gpt2", "falcon_h1",
]  # fmt: skip


def picture(seed: int) -> torch.Tensor:
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))


def random_rows(seed: int, count: int = 4) -> list[Row]:
    """Rows of text with none to two pictures anywhere in them; at least one of each kind."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for i in range(count):
        pictures = [0, 2, 1][i] if i < 3 else rng.randrange(3)
        row: Row = [rng.randrange(4, 64) for _ in range(rng.randrange(2, 8))]
        for _ in range(pictures):
            row.insert(rng.randrange(len(row)), picture(rng.randrange(10**6)))
        rows.append(row)
    rng.shuffle(rows)
    return rows


def batch(rows: Sequence[Row], side: str = "left") -> dict[str, torch.Tensor]:
    ids = [[token for part in row for token in ([part] if isinstance(part, int) else [IMAGE] * TOKENS)] for row in rows]
    length = max(map(len, ids))
    padding = [[PAD] * (length - len(row)) for row in ids]
    mask = [[1] * len(row) for row in ids]
    empty = [[0] * len(pad) for pad in padding]
    left = side == "left"
    inputs = {
        "input_ids": torch.tensor([p + r if left else r + p for p, r in zip(padding, ids, strict=True)]),
        "attention_mask": torch.tensor([e + m if left else m + e for e, m in zip(empty, mask, strict=True)]),
    }
    if pictures := [part for row in rows for part in row if isinstance(part, torch.Tensor)]:
        inputs["pixel_values"] = torch.stack(pictures)
    return inputs


def real(values: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Each row without its padding."""
    return [row[keep.bool()] for row, keep in zip(values, mask, strict=True)]


def answers(model: OmniForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    given = inputs.get("input_ids")
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=PAD, **options)
    return out[:, given.shape[1] if given is not None else 0 :].tolist()


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


# --- A row is alone in the world --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("thinker", "tower"), PAIRS)
def test_logits_are_those_of_one_row_at_a_time(make_model: Make, thinker: str, tower: str, side: str) -> None:
    model, rows = make_model(thinker, tower), random_rows(seed=1)
    inputs = batch(rows, side)
    with torch.no_grad():
        together = real(model(**inputs).logits, inputs["attention_mask"])
        for row, logits in zip(rows, together, strict=True):
            close(logits, model(**batch([row])).logits[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("thinker", "tower"), PAIRS)
def test_answers_are_those_of_one_row_at_a_time(make_model: Make, thinker: str, tower: str, side: str) -> None:
    model, rows = make_model(thinker, tower), random_rows(seed=2)
    alone = [answers(model, batch([row]))[0] for row in rows]
    assert len({tuple(answer) for answer in alone}) > 1, "these models say the same to everything"
    assert answers(model, batch(rows, side)) == alone
    assert answers(model, batch(rows, side), cache_implementation="static") == alone
    assert answers(model, batch(rows, side), use_cache=False) == alone


@pytest.mark.parametrize("seed", range(6))
def test_any_composition_of_rows(make_model: Make, seed: int) -> None:
    model, rows = make_model(), random_rows(seed, count=5)
    side = ["left", "right"][seed % 2]
    inputs = batch(rows, side)
    with torch.no_grad():
        for row, logits in zip(rows, real(model(**inputs).logits, inputs["attention_mask"]), strict=True):
            close(logits, model(**batch([row])).logits[0])
    assert answers(model, inputs) == [answers(model, batch([row]))[0] for row in rows]


def test_the_answer_depends_on_the_picture_and_its_place(make_model: Make) -> None:
    """Otherwise everything above would hold for a model that ignores its pictures."""
    model, a, b = make_model(), picture(1), picture(2)
    with torch.no_grad():
        logits = [model(**batch([row])).logits[0, -1] for row in ([a, b, 9], [b, a, 9], [a, a, 9])]
    assert (logits[0] - logits[1]).abs().max() > 0.01
    assert (logits[0] - logits[2]).abs().max() > 0.01


def test_padding_without_a_mask_is_found_by_its_id(make_model: Make) -> None:
    model, rows = make_model(), random_rows(seed=3)
    inputs = batch(rows, "right")
    del inputs["attention_mask"]
    assert answers(model, inputs) == [answers(model, batch([row]))[0] for row in rows]


def test_prompts_come_back_padded_on_the_left(make_model: Make) -> None:
    model, rows = make_model(), random_rows(seed=4)
    right, left = batch(rows, "right"), batch(rows, "left")
    out = model.generate(**right, max_new_tokens=3, eos_token_id=-1)
    assert out[:, : left["input_ids"].shape[1]].equal(left["input_ids"])


def test_a_masked_picture_stays_where_it_is(make_model: Make) -> None:
    """Whoever masks a picture does not pad; moving it would exchange it for another."""
    model, inputs = make_model(), batch([[9, picture(1), 8, picture(2)]])
    inputs["attention_mask"][0, -TOKENS:] = 0
    out = model.generate(**inputs, max_new_tokens=1)
    assert out[:, :-1].equal(inputs["input_ids"])


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}])
def test_beams_with_several_pictures_in_a_row(make_model: Make, options: dict[str, int]) -> None:
    model = make_model()
    rows: list[Row] = [[picture(1), 9, picture(2), 11], [7, 8], [picture(3), 13]]
    alone = [answer for row in rows for answer in answers(model, batch([row]), **options)]
    for side in ("left", "right"):
        assert answers(model, batch(rows, side), **options) == alone


def test_samples_see_their_own_pictures(make_model: Make) -> None:
    """With a temperature near zero every sample is the greedy answer, if it sees the right pictures."""
    model = make_model()
    rows: list[Row] = [[picture(1), 9, picture(2), 11], [7, 8]]
    inputs = batch(rows)
    out = model.generate(
        **inputs, max_new_tokens=5, do_sample=True, temperature=1e-4, num_return_sequences=3, eos_token_id=-1
    )
    greedy = answers(model, inputs)
    sampled = out[:, inputs["input_ids"].shape[1] :].tolist()
    assert [answer[:5] for answer in greedy for _ in range(3)] == sampled


@pytest.mark.skipif(OLD, reason="transformers cuts the prompts of items from 5.23 on")
def test_a_prompt_in_chunks(make_model: Make) -> None:
    model, inputs = make_model(), batch([[9, picture(1), 8, picture(2)], [picture(3), 7]])
    assert answers(model, inputs, prefill_chunk_size=3) == answers(model, inputs)


def test_placeholders_are_never_generated(make_model: Make) -> None:
    """The head likes nothing better than `<image>`; an answer with it could not be read again."""
    model, inputs = make_model(), batch([[9, picture(1), 8], [7]])
    head = torch.nn.Linear(32, 64)
    head.bias.data[IMAGE] = 1e4
    model.set_output_embeddings(head)
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        assert IMAGE not in sum(answers(model, inputs, **options), [])
    assert (
        IMAGE
        not in model.generate(**inputs, do_sample=True, top_k=1, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :]
    )


def test_a_smaller_model_drafts(make_model: Make) -> None:
    model, draft = make_model(), make_model(text={"num_hidden_layers": 1}, seed=1)
    inputs = batch([[9, picture(1), 8, picture(2)]])
    assert answers(model, inputs, assistant_model=draft) == answers(model, inputs)


# --- Other ways to hand things in -------------------------------------------------------------------------------------


@pytest.mark.parametrize("thinker", ["qwen3", "gpt2", "gemma", "gemma3_text"])
def test_embeddings_instead_of_ids(make_model: Make, thinker: str) -> None:
    model, rows = make_model(thinker), random_rows(seed=5)
    inputs = batch(rows, "right")
    embedded = {key: value for key, value in inputs.items() if key != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        close(model(**embedded).logits, model(**inputs).logits)
    assert answers(model, embedded) == answers(model, inputs)
    assert answers(model, embedded, num_beams=2) == answers(model, inputs, num_beams=2)


def test_a_picture_is_encoded_once_and_asked_about_often(make_model: Make) -> None:
    model, rows = make_model(), [[picture(1), 9], [8, picture(1), 7], [picture(1), 6, 5]]
    inputs = batch(rows)
    encoded = model.get_image_features(picture(1)[None])
    assert [tuple(item.shape) for item in encoded.pooler_output] == [(TOKENS, 32)]
    encoded.pooler_output = encoded.pooler_output * 3
    pre_encoded = {**inputs, "mm_encoder_outputs": {"image": encoded}}
    del pre_encoded["pixel_values"]
    calls: list[Any] = []
    model.model.image_tower.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        close(model(**pre_encoded).logits, model(**inputs).logits)
    assert len(calls) == 1  # by the raw pictures
    assert answers(model, pre_encoded) == answers(model, inputs)
    assert len(calls) == 2


def test_each_picture_is_encoded_once_per_answer(make_model: Make) -> None:
    model, calls = make_model(), []
    model.model.image_tower.register_forward_hook(lambda *_: calls.append(None))
    answers(model, batch([[picture(1), 9]]), num_beams=2)
    assert len(calls) == 1


def test_a_conversation_continues_with_its_cache(make_model: Make) -> None:
    model, inputs = make_model(), batch([[picture(1), 9, 8]])
    first = model.generate(**inputs, max_new_tokens=4, eos_token_id=-1, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[11, 12]])], dim=1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = answers(model, whole)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
    assert answers(model, more) == expected
    cache = first.past_key_values
    for call in (model.generate, model):
        with pytest.raises(ValueError, match="Expected one cache, found two, as `past_key_values` and as `cache`"):
            call(**more, cache=cache)


def test_step_by_step_with_a_cache_by_hand(make_model: Make) -> None:
    model, inputs = make_model("gpt2"), batch([[picture(1), 9, 8], [7, 6]], "left")
    with torch.no_grad():
        whole = model(**inputs).logits
        cut = {**inputs, "input_ids": inputs["input_ids"][:, :-1], "attention_mask": inputs["attention_mask"][:, :-1]}
        cache = model(**cut, use_cache=True).past_key_values
        last = model(
            input_ids=inputs["input_ids"][:, -1:], attention_mask=inputs["attention_mask"], past_key_values=cache
        )
    close(last.logits[:, 0], whole[:, -1])


def test_outputs_as_a_tuple(make_model: Make) -> None:
    model, inputs = make_model(), batch([[picture(1), 9]])
    with torch.no_grad():
        named, bare = model(**inputs), model(**inputs, return_dict=False)
    close(bare[0], named.logits)
    assert named.encoder_hidden_states["image"].shape == (TOKENS, 32)


# --- The Thinker is the stock model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("thinker", FAMILIES)
def test_text_alone_gives_the_stock_models_logits(make_model: Make, thinker: str, tied: bool) -> None:
    model = make_model(thinker, text={"tie_word_embeddings": tied})
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)).eval()
    getattr(stock, stock.base_model_prefix).load_state_dict(model.model.language_model.state_dict())
    stock.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    ids = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = stock(ids, labels=ids), model(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    shared = model.lm_head.weight is model.get_input_embeddings().weight
    assert shared == tied == model.config.tie_word_embeddings


def test_logits_of_some_positions_alone(make_model: Make) -> None:
    model, ids = make_model(), torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3] = mask[1, 5:7] = True
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for kept, some in [
            (0, expected),
            (2, expected[:, -2:]),
            (torch.tensor([1, 4]), expected[:, [1, 4]]),
            (torch.tensor([[1, 4], [0, 8]]), torch.stack([expected[0, [1, 4]], expected[1, [0, 8]]])),
            (mask, expected[mask]),
        ]:
            torch.testing.assert_close(model(input_ids=ids, logits_to_keep=kept).logits, some)


def test_a_head_that_does_more_is_refused_by_name(make_config: Callable[..., OmniConfig]) -> None:
    config = make_config()
    config.text_config = {
        "model_type": "recurrent_gemma",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
    }
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM"):
        OmniForConditionalGeneration(OmniConfig(modalities=config.modalities, text_config=config.text_config))


SMALLEST = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "n_embd": 32, "n_head": 2, "n_layer": 1}


@pytest.mark.parametrize("thinker", ["mamba", "openai-gpt"])
def test_a_language_model_without_a_cache_is_refused(make_config: Callable[..., OmniConfig], thinker: str) -> None:
    config = OmniConfig(modalities=make_config().modalities, text_config={"model_type": thinker, **SMALLEST})
    with pytest.raises(ValueError, match="has no cache of keys and values"):
        OmniForConditionalGeneration(config)


def test_a_thinker_that_looks_ids_up_in_every_layer_needs_ids(make_model: Make) -> None:
    model, inputs = make_model("gemma4_text"), batch([[picture(1), 9]])
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="Expected `input_ids`, found `inputs_embeds` alone"):
        model(inputs_embeds=embedded, **inputs)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary(make_model: Make, tied: bool) -> None:
    model = make_model(text={"tie_word_embeddings": tied})
    inputs = batch([[picture(1), 9]])
    with torch.no_grad():
        before = model(**inputs).logits
        model.resize_token_embeddings(70, mean_resizing=False)
        after = model(**inputs, labels=inputs["input_ids"])
    assert after.logits.shape[-1] == model.config.text_config.vocab_size == 70
    close(after.logits[..., :64], before)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


# --- What does not fit is refused -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(make_model: Make) -> OmniForConditionalGeneration:
    return make_model()


def test_a_prompt_that_was_cut(plain: OmniForConditionalGeneration) -> None:
    inputs = batch([[7, 8, 9, 10, 11, 12, 13], [picture(1), 9], [picture(2), 9]])
    inputs["input_ids"][1, -2] = 9  # the last placeholder of row 1
    message = r"Row 1 has 4 placeholders <image> .*'image'.* made 5 tokens"
    with pytest.raises(ValueError, match=message):
        plain(**inputs)
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        with pytest.raises(ValueError, match=message):
            plain.generate(**inputs, max_new_tokens=2, **options)


def test_the_right_sum_in_the_wrong_rows(plain: OmniForConditionalGeneration) -> None:
    inputs = batch([[picture(1), 9, 8], [picture(2), 9, 8]])
    inputs["input_ids"][0, 0], inputs["input_ids"][1, -1] = 9, IMAGE
    with pytest.raises(ValueError, match="Row 0 has 4 placeholders"):
        plain(**inputs)


def test_more_pictures_than_places(plain: OmniForConditionalGeneration) -> None:
    inputs = batch([[picture(1), 9]])
    inputs["pixel_values"] = torch.stack([picture(1), picture(2)])
    with pytest.raises(ValueError, match=r"2 items of modality 'image'.* for 1 only"):
        plain(**inputs)


def test_pictures_without_a_placeholder(plain: OmniForConditionalGeneration) -> None:
    inputs = {**batch([[7, 8]]), "pixel_values": picture(1)[None]}
    with pytest.raises(ValueError, match="1 items of modality 'image'"):
        plain(**inputs)
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"prefill_chunk_size": 1}):
        with pytest.raises(ValueError, match="1 items of modality 'image'"):
            plain.generate(**inputs, max_new_tokens=2, **options)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}])
def test_a_placeholder_without_a_picture(plain: OmniForConditionalGeneration, options: dict[str, Any]) -> None:
    inputs = batch([[7, 8], [picture(1), 9]])
    del inputs["pixel_values"]
    message = r"Row 1 has 5 placeholders <image> .* 0 tokens"
    with pytest.raises(ValueError, match=message):
        plain(**inputs)
    with pytest.raises(ValueError, match=r"Row \d has 5 placeholders <image> .* 0 tokens"):
        plain.generate(**inputs, max_new_tokens=2, **options)
    embeds = plain.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match=message):
        plain(inputs_embeds=embeds, **inputs)


def test_a_placeholder_without_a_picture_in_compiled_code(plain: OmniForConditionalGeneration) -> None:
    torch.compiler.reset()
    compiled = torch.compile(plain.forward, fullgraph=True, backend="aot_eager")
    ids = batch([[picture(1), 9]])["input_ids"]
    with pytest.raises(RuntimeError), torch.no_grad():  # without numbers: compiled code cannot look at them
        compiled(input_ids=ids)


def test_items_given_twice(plain: OmniForConditionalGeneration) -> None:
    inputs = batch([[picture(1), 9]])
    encoded = {"image": plain.get_image_features(inputs["pixel_values"])}
    with pytest.raises(ValueError, match="'image' came twice"):
        plain(**inputs, mm_encoder_outputs=encoded)
    with pytest.raises(ValueError, match="'image' came twice"):
        plain.generate(**inputs, mm_encoder_outputs=encoded, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"\['sound'\], but this model has \['image'\]"):
        plain(input_ids=inputs["input_ids"], mm_encoder_outputs={"sound": encoded["image"]})


def test_both_or_neither_of_ids_and_embeddings(plain: OmniForConditionalGeneration) -> None:
    ids = torch.tensor([[7, 8]])
    with pytest.raises(ValueError, match="exactly one"):
        plain(attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="exactly one"):
        plain(input_ids=ids, inputs_embeds=plain.get_input_embeddings()(ids))


def test_an_argument_that_nobody_knows(plain: OmniForConditionalGeneration) -> None:
    ids = torch.tensor([[7, 8]])
    with pytest.raises(TypeError, match=r"'pixel_vals'.*\['pixel_values'\]"):
        plain(input_ids=ids, pixel_vals=torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="pixel_vals"):
        plain.generate(input_ids=ids, pixel_vals=torch.zeros(1, 3, 16, 16))


def test_an_encoder_without_the_output_that_is_asked_for(make_model: Make) -> None:
    from dataclasses import replace

    from omni import registry

    with registry.temporary():
        image = registry.get_modality("image")
        registry._registered["image"] = replace(image, read=lambda encoded, _: {"grid": encoded.grid})
        with pytest.raises(ValueError, match=r"no \['cls'\] for output 'cls\+grid'; it has \['grid'\]"):
            make_model()(**batch([[picture(1), 9]]))


# --- Training ---------------------------------------------------------------------------------------------------------


def loss_and_gradients(model: OmniForConditionalGeneration) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs = batch([[picture(1), 9, 8], [7, 6]], "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_dropout(model: OmniForConditionalGeneration) -> OmniForConditionalGeneration:
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "config") and hasattr(module.config, "hidden_dropout_prob"):
            module.config.hidden_dropout_prob = 0.0
    return model


@pytest.mark.parametrize("projector", ["linear", "mlp", "unshuffle_mlp"])
@pytest.mark.parametrize("output", ["cls", "grid", "cls+grid"])
def test_every_parameter_learns(make_model: Make, projector: str, output: str) -> None:
    model = make_model(output=output, projector=projector, factor=2 if projector == "unshuffle_mlp" else 1)
    row: Row = [picture(1), 9, 8]
    tokens = sum(model.config.num_tokens("image", (2, 2)) for _ in range(1))
    ids = torch.tensor([[IMAGE] * tokens + [9, 8]])
    model(input_ids=ids, pixel_values=row[0][None], labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_activation_checkpointing_changes_nothing(make_model: Make) -> None:
    model = without_dropout(make_model())
    loss, gradients = loss_and_gradients(model)
    kind = "gradient" if OLD else "activation"  # one thing under two names
    for reentrant in (True, False):
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": reentrant})
        again, same = loss_and_gradients(model)
        torch.testing.assert_close(again, loss)
        assert same.keys() == gradients.keys()
        for name in gradients:
            torch.testing.assert_close(same[name], gradients[name], msg=name)
        getattr(model, f"{kind}_checkpointing_disable")()


def test_frozen_parts_stay_in_eval_mode(make_model: Make) -> None:
    model = make_model()
    model.model.image_tower.requires_grad_(False)
    model.train()
    assert not model.model.image_tower.training
    assert model.model.image_projector.training
    assert model.model.language_model.training
    model.model.image_tower.requires_grad_(True)
    assert model.train().model.image_tower.training
    assert not model.eval().model.language_model.training


def test_a_loss_that_counts_over_several_batches(plain: OmniForConditionalGeneration) -> None:
    """Trainer divides by the number of labels over all accumulated batches; the names must arrive."""
    inputs = batch([[picture(1), 9, 8]])
    labels = inputs["input_ids"]
    with torch.no_grad():
        mean = plain(**inputs, labels=labels).loss
        halved = plain(**inputs, labels=labels, num_items_in_batch=2 * (labels.shape[1] - 1)).loss
        shifted = plain(
            **inputs, labels=labels, shift_labels=torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        )
    torch.testing.assert_close(halved, mean / 2)
    torch.testing.assert_close(shifted.loss, mean)


# --- What torch and transformers do to models -------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["omni_vision", "clip_vision_model"])
def test_compiles_without_a_break(make_model: Make, tower: str) -> None:
    torch.compiler.reset()
    model, inputs = make_model("qwen3", tower), batch([[picture(1), 9, picture(2)], [7, 6]])
    inputs["labels"] = inputs["input_ids"]
    with torch.no_grad():
        expected = model(**inputs)
        found = torch.compile(model.forward, fullgraph=True, backend="aot_eager")(**inputs)
    close(found.logits, expected.logits)
    close(found.loss, expected.loss)


@pytest.mark.parametrize(("thinker", "tower"), PAIRS)
def test_half_precision(make_model: Make, thinker: str, tower: str) -> None:
    """The encoder's input stays float32, as the processor makes it."""
    model, inputs = make_model(thinker, tower), batch([[picture(1), 9], [7, 6]])
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model.to(torch.bfloat16)(**inputs).logits
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean() + 0.05
    assert len(answers(model, inputs)) == 2


def test_attention_maps_whatever_computes_them(make_config: Callable[..., OmniConfig], make_model: Make) -> None:
    maps = {}
    for implementation in ("eager", "sdpa"):
        model = make_model()
        model.set_attn_implementation(implementation)
        inputs = batch([[picture(1), 9, 8]])
        with torch.no_grad():
            encoded = model.get_image_features(inputs["pixel_values"], output_attentions=True)
            outputs = model(**inputs, output_attentions=True)
        maps[implementation] = (*encoded.attentions, *outputs.attentions)
        assert len(encoded.attentions) == len(outputs.attentions) == 2
        for attention in maps[implementation]:
            close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    for eager, sdpa in zip(maps["eager"], maps["sdpa"], strict=True):
        close(sdpa, eager)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("thinker", ["qwen3", "gemma3_text"])
def test_attention_maps_while_generating(make_model: Make, thinker: str, cache: str) -> None:
    model, inputs = make_model(thinker), batch([[picture(1), 9, 8], [7, 6]])
    options = {"max_new_tokens": 3, "eos_token_id": -1, "return_dict_in_generate": True, "cache_implementation": cache}
    mapped = model.generate(**inputs, output_attentions=True, **options)
    assert mapped.sequences.equal(model.generate(**inputs, **options).sequences)
    assert [len(step) for step in mapped.attentions] == [2, 2, 2]
    assert model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_of_what_sees_what(make_model: Make, implementation: str) -> None:
    """As the collator makes it: bool[B, 1, L, L]."""
    model, inputs = make_model(), batch([[picture(1), 9, 8], [7, 6]])
    with torch.no_grad():
        expected = model(**inputs).logits
        causal = torch.ones(inputs["input_ids"].shape[1], inputs["input_ids"].shape[1], dtype=torch.bool).tril()
        seen = causal & inputs["attention_mask"].bool()[:, None, None]
        seen |= torch.eye(len(causal), dtype=torch.bool)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model.set_attn_implementation({"text_config": implementation})
        found = model(**{**inputs, "attention_mask": seen}, position_ids=positions).logits
    for row, other in zip(real(found, inputs["attention_mask"]), real(expected, inputs["attention_mask"]), strict=True):
        close(row, other)


def test_attention_per_part(make_config: Callable[..., OmniConfig]) -> None:
    config = make_config()
    config._attn_implementation = {"text_config": "eager", "image_config": "sdpa"}
    model = OmniForConditionalGeneration(config)
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.image_tower.config._attn_implementation == "sdpa"


def test_a_copy_is_a_model_of_its_own(make_model: Make) -> None:
    model, inputs = make_model(), batch([[picture(1), 9]])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**inputs).logits
        for parameter in twin.parameters():
            parameter.zero_()
        assert model(**inputs).logits.equal(before)
        assert not twin(**inputs).logits.equal(before)
    twin.config.image_token_id = 5
    assert model.config.image_token_id == IMAGE


def test_the_base_model_alone(make_model: Make) -> None:
    model, inputs = make_model(), batch([[picture(1), 9]])
    assert isinstance(model.model, OmniModel)
    with torch.no_grad():
        hidden_states = model.model(**inputs).last_hidden_state
        close(model.lm_head(hidden_states), model(**inputs).logits)


def test_names_that_tools_look_for(plain: OmniForConditionalGeneration) -> None:
    import inspect

    assert plain.get_decoder() is plain.model.language_model
    assert plain.get_encoder(modality="image") is plain.model.image_tower
    assert plain.get_output_embeddings() is plain.lm_head
    for model in (plain, plain.model):
        assert "pixel_values" in inspect.signature(model.forward).parameters
    assert plain.input_modalities == ("image", "text")
    assert plain.can_generate()

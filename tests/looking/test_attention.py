"""Where models look: the weights against others that compute them by themselves, and the shipped checkpoints' scenes."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, CLIPImageProcessorPil

from omni import OmniImageProcessor, OmniProcessor, scenes
from omni.checkpoints.fingerprints import read_tensors
from omni.data.conversations import ask
from omni.items import read_items
from omni.loading.checkpoint import load
from omni.loading.encoder import Encoder, load_encoder
from omni.looking.attention import (
    AttentionError,
    EncoderAttention,
    _words,
    encoder_attention,
    session_attention,
    word_attention,
)
from omni.looking.panels import draw_encoder, draw_words, overlay
from omni.questions import write_prompts
from omni.session import Session, answer
from omni.vision.pictures import read_picture

from ..conftest import invoke

VISION, OMNI = Path("checkpoints/vision_tiny"), Path("checkpoints/omni_tiny")
SCENE, SECOND = Path("examples/scene.png"), Path("examples/second.png")
SIZE = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "omni_vision": {"intermediate_size": 32},
    "clip_vision_model": {"intermediate_size": 32},
    "siglip_vision_model": {"intermediate_size": 32},
    "vit": {"intermediate_size": 32},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
}
"""Pictures of 32 x 32 become 4 x 4 patches."""


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(VISION)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, OmniProcessor]:
    return load(OMNI)


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return read_picture(SCENE)


def photo(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_tower(model_type: str, attention: str = "sdpa") -> Encoder:
    config = AutoConfig.for_model(model_type, **SIZE, **TOWERS[model_type])
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for attention to be uneven
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 3
            )
    return Encoder(model, OmniImageProcessor(size={"height": 32, "width": 32}))


# --- The encoder, by hand ---------------------------------------------------------------------------------------------


def maps_by_hand(folder: Path, pixels: np.ndarray, heads: int = 2, patch: int = 16) -> list[np.ndarray]:
    """Attention of every layer, float64[H, n, n], from the weights in the file and nothing else. `pixels` [3, 224, 224]"""
    weights = {name: tensor.double().numpy() for name, tensor in read_tensors(folder).items()}
    side = pixels.shape[-1] // patch

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

    kernel = weights["embeddings.patch_embeddings.weight"]
    patches = pixels.reshape(3, side, patch, side, patch).transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
    patches = patches @ kernel.reshape(len(kernel), -1).T + weights["embeddings.patch_embeddings.bias"]
    x = np.concatenate([weights["embeddings.cls_token"][0], patches]) + weights["embeddings.position_embeddings"][0]
    found = []
    while f"layers.{len(found)}.norm1.weight" in weights:
        layer = f"layers.{len(found)}"
        query, key, value = np.split(linear(norm(x, f"{layer}.norm1"), f"{layer}.attention.qkv"), 3, axis=-1)
        maps, mixed = [], []
        for q, k, v in zip(*(np.split(part, heads, axis=-1) for part in (query, key, value)), strict=True):
            scores = q @ k.T / math.sqrt(q.shape[-1])
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            maps.append(shares / shares.sum(-1, keepdims=True))
            mixed.append(maps[-1] @ v)
        x = x + linear(np.concatenate(mixed, axis=-1), f"{layer}.attention.o_proj")
        hidden = linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1")
        x = x + linear(hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2, f"{layer}.mlp.fc2")
        found.append(np.array(maps))
    return found


@pytest.fixture(scope="module")
def by_hand(encoder: Encoder, scene: Image.Image) -> list[np.ndarray]:
    return maps_by_hand(VISION, encoder.prepare([scene])["pixel_values"][0].double().numpy())


@pytest.mark.parametrize("layer", [1, 2, 3, None])
def test_heads_are_those_of_the_weights(
    encoder: Encoder, scene: Image.Image, by_hand: list[np.ndarray], layer: int | None
) -> None:
    found = encoder_attention(encoder, scene, layer)
    expected = by_hand[(layer or 4) - 1]
    assert (found.layer, found.layers, found.query) == (layer or 4, 4, "CLS")
    assert found.heads.shape == (2, 14, 14)
    np.testing.assert_allclose(found.heads, expected[:, 0, 1:].reshape(2, 14, 14), atol=1e-6)
    np.testing.assert_allclose(found.heads.sum((1, 2)) + expected[:, 0, 0], 1, atol=1e-5)  # the rest is on CLS
    np.testing.assert_allclose(found.mean, (found.heads[0] + found.heads[1]) / 2, atol=1e-7)


@pytest.mark.parametrize("layer", [1, 4])
def test_rollout_is_that_of_abnar_and_zuidema(
    encoder: Encoder, scene: Image.Image, by_hand: list[np.ndarray], layer: int
) -> None:
    joint = [(maps.mean(0) + np.eye(197)) / 2 for maps in by_hand[:layer]]
    flow = np.linalg.multi_dot([*reversed(joint), np.eye(197)])
    np.testing.assert_allclose(flow.sum(-1), 1)
    rollout = encoder_attention(encoder, scene, layer).rollout
    np.testing.assert_allclose(rollout, flow[0, 1:].reshape(14, 14), atol=1e-6)


# --- Any tower --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TOWERS)
def test_any_tower_shows_where_it_looks_and_stays_as_it_was(model_type: str) -> None:
    tower, eager = make_tower(model_type), make_tower(model_type, "eager")
    pixels = tower.prepare([photo()])
    before = tower.encode(pixels)
    found = encoder_attention(tower, photo(), 2)
    assert tower.model.config._attn_implementation == "sdpa"
    after = tower.encode(pixels)
    assert all(torch.equal(before[name], after[name]) for name in before)

    with torch.no_grad():
        maps = eager.model(**pixels, output_attentions=True).attentions[1][0]
    assert maps.std() > 0.01
    has_cls = model_type != "siglip_vision_model"
    row = maps[:, 0] if has_cls else maps.mean(1)
    assert found.query == ("CLS" if has_cls else "all patches")
    assert found.rollout.shape == (4, 4)
    np.testing.assert_allclose(found.heads, row[:, -16:].reshape(2, 4, 4), atol=1e-6)


def test_an_error_leaves_the_tower_as_it_was() -> None:
    tower = make_tower("clip_vision_model")
    broken = Encoder(tower.model, OmniImageProcessor(size={"height": 64, "width": 64}))
    with pytest.raises(ValueError, match="doesn't match model"):
        encoder_attention(broken, photo())
    assert tower.model.config._attn_implementation == "sdpa"


def test_what_cannot_be_seen_is_said(encoder: Encoder, scene: Image.Image) -> None:
    with pytest.raises(AttentionError, match=r"OmniVisionModel has layers 1 to 4, found 5; choose one of them\."):
        encoder_attention(encoder, scene, 5)
    tower = make_tower("vit")
    tower.model.train()
    with pytest.raises(AttentionError, match="ViTModel is in training mode"):
        encoder_attention(tower, photo())
    windows = AutoModel.from_config(
        AutoConfig.for_model("swin", image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
    )
    with pytest.raises(AttentionError, match="SwinModel gives no maps of attention between its tokens"):
        encoder_attention(Encoder(windows.eval(), tower.preprocessor), photo())


# --- The Thinker ------------------------------------------------------------------------------------------------------


def looked_at_in_steps(model: Any, processor: Any, pictures: list[Image.Image], question: str, limit: int) -> Any:
    """The mean over heads and layers while each token is really written, with the cache: a row for each; and the ids."""
    inputs = write_prompts(processor, [ask(question, items=read_items(pictures))])
    made = model.generate(
        **inputs, max_new_tokens=limit, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    rows = [torch.stack([layer[0, :, -1].mean(0) for layer in step]).mean(0) for step in made.attentions]
    return [row.numpy() for row in rows], made.sequences[0].tolist()


def test_maps_are_those_of_the_steps_in_which_the_words_were_written(shipped: Any, scene: Image.Image) -> None:
    model, processor = shipped
    pictures, question = [scene, read_picture(SECOND)], "what is below the heart"
    found = word_attention(model, processor, pictures, question)
    assert len(found.words) == 2
    assert found.answer.answer == answer(model, processor, pictures, question).answer == " ".join(found.words)

    rows, ids = looked_at_in_steps(model, processor, pictures, question, 8)
    places = [place for place, token in enumerate(ids) if token == processor.image_token_id]
    assert len(places) == 2 * 50
    for word in range(2):  # each is one token
        for picture in range(2):
            cls, *cells = places[50 * picture : 50 * (picture + 1)]
            assert found.cls[picture, word] == pytest.approx(rows[word][cls], abs=1e-6)
            for i in range(14):
                for j in range(14):  # four patches share a token
                    expected = rows[word][cells[(i // 2) * 7 + j // 2]] / 4
                    assert found.maps[picture][word, i, j] == pytest.approx(expected, abs=1e-6)
    everything = sum(maps.sum((1, 2)) for maps in found.maps) + found.cls.sum(0) + found.text
    np.testing.assert_allclose(everything, 1, atol=1e-5)


@pytest.mark.parametrize("thinker", ["qwen3", "gpt2", "opt", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("output", ["cls+grid", "grid"])
def test_any_thinker_shows_where_it_looks_and_stays_as_it_was(
    make_pair: Callable[..., Any], thinker: str, output: str
) -> None:
    model, processor = make_pair(thinker, output=output)
    shown = [photo(20, 20, seed) for seed in range(2)]
    session = Session(model, processor, shown)
    said = session.ask("how many", 6).answer
    before = model.model.language_model.config._attn_implementation
    found = word_attention(model, processor, shown, "how many", 6)
    assert model.model.language_model.config._attn_implementation == before
    assert list(found.words) == said.split()
    again = session_attention(session, "how many", 6)  # of pictures that were encoded and read before
    assert again.words == found.words
    for mine, other in zip(again.maps, found.maps, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    rows, ids = looked_at_in_steps(model, processor, shown, "how many", 6)
    assert [maps.shape for maps in found.maps] == [(len(found.words), 2, 2)] * 2
    everything = sum(maps.sum((1, 2)) for maps in found.maps) + found.cls.sum(0) + found.text
    np.testing.assert_allclose(everything, 1, atol=1e-5)
    first = np.array(
        [place for place, token in enumerate(ids) if token == processor.image_token_id][: 4 + (output != "grid")]
    )
    members = dict(_words(processor.tokenizer, ids[found.answer.tokens_read :]))
    if len(members) == len(found.words):  # no word twice
        for word, tokens in members.items():
            mean = np.mean([rows[token][first[-4:]] for token in tokens], axis=0)
            np.testing.assert_allclose(found.maps[0][found.words.index(word)].flatten(), mean, atol=1e-5)
    assert found.cls.any() == (output == "cls+grid" and bool(found.words))


def test_an_error_leaves_the_thinker_as_it_was(make_pair: Callable[..., Any]) -> None:
    model, processor = make_pair("qwen3")
    config = model.model.language_model.config

    def fail(*_: Any) -> None:
        if config._attn_implementation == "eager":
            raise RuntimeError("out of memory")

    before = config._attn_implementation
    hook = model.model.language_model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        word_attention(model, processor, [photo()], "how many", 2)
    assert config._attn_implementation == before != "eager"
    hook.remove()
    assert word_attention(model, processor, [photo()], "how many", 2).maps[0].shape[1:] == (2, 2)


def test_what_a_thinker_cannot_look_at_is_said(make_pair: Callable[..., Any]) -> None:
    model, processor = make_pair(output="cls", projector="linear")
    with pytest.raises(AttentionError, match="gets only the CLS token of a picture"):
        word_attention(model, processor, [photo()], "how many")
    model, processor = make_pair()
    with pytest.raises(AttentionError, match="Expected at least one item to look at"):
        word_attention(model, processor, [], "how many")
    with pytest.raises(AttentionError, match="in training mode"):
        word_attention(model.train(), processor, [photo()], "how many")


@pytest.mark.parametrize("text", ["a red  circle", " blue", "how many, na\u00efve \u4e2d\u6587 \U0001f600 end.", ""])
def test_words_are_made_of_all_of_their_tokens(tokenizer: Any, text: str) -> None:
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    words = _words(tokenizer, ids)
    assert [word for word, _ in words] == text.split()
    for word, members in words:
        assert members
        decoded = tokenizer.decode([ids[place] for place in members])
        assert decoded.strip() == word or not word.isascii()  # of a letter in parts the last part completes it
    assert len(ids) - 1 not in [place for _, members in words for place in members]


# --- Does it look at the object? --------------------------------------------------------------------------------------


def test_the_shipped_checkpoints_look_at_the_object(encoder: Encoder, shipped: Any) -> None:
    """Here on a few scenes; `examples/attention_mass.py` measures it on many."""
    drawn = [scenes.sample_scene(seed, "test", max_objects=1) for seed in range(50, 62)]
    covered = np.array([scenes.object_map(each) >= 0 for each in drawn])
    shown = [scenes.render(each) for each in drawn]
    maps = {
        "CLS": [encoder_attention(encoder, picture).mean for picture in shown],
        "rollout": [encoder_attention(encoder, picture).rollout for picture in shown],
        "Thinker": [word_attention(*shipped, [picture], "what color is the object").maps[0][0] for picture in shown],
    }
    mass = {
        name: np.mean([each[mask].sum() / each.sum() for each, mask in zip(found, covered, strict=True)])
        for name, found in maps.items()
    }
    assert mass["CLS"] > 2 * covered.mean()
    assert mass["rollout"] > 1.5 * covered.mean()
    assert mass["Thinker"] > 4 * covered.mean()


# --- Drawing ----------------------------------------------------------------------------------------------------------


def test_an_overlay_is_brightest_where_the_weight_is(scene: Image.Image) -> None:
    weights = np.zeros((4, 2), dtype=np.float32)
    weights[2, 1], weights[0, 0] = 0.3, 0.1
    drawn = overlay(Image.new("RGB", (60, 80), "grey"), weights)
    assert drawn.size == (60, 80)
    bright = np.asarray(drawn.convert("L"), dtype=float).reshape(4, 20, 2, 30)
    assert (bright.std((1, 3)) < 1e-9).all()  # one colour for each patch
    patches = bright.mean((1, 3))
    assert patches.argmax() == 2 * 2 + 1
    assert patches[2, 1] > patches[0, 0] > patches[1, 0] == patches[3, 1]
    empty = np.asarray(overlay(scene, np.zeros((4, 2), dtype=np.float32)))
    assert empty.std() > 10  # the picture is still there


def test_a_sheet_has_a_panel_for_everything(encoder: Encoder, scene: Image.Image) -> None:
    attention = encoder_attention(encoder, scene)
    drawn = draw_encoder(attention, encoder, scene)
    assert drawn.width == 16 + 5 * (224 + 16)  # the picture, two heads, mean, rollout
    twelve = EncoderAttention(4, 4, "CLS", np.repeat(attention.heads, 6, axis=0), attention.rollout)
    more = draw_encoder(twelve, encoder, scene)
    assert more.width == 16 + 6 * (224 + 16)
    assert more.height == drawn.height + 2 * (224 + 56)


def test_what_an_image_processor_cuts_off_is_not_shown() -> None:
    """Otherwise the maps would lie beside what they are about."""
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    tower = make_tower("clip_vision_model")
    edge = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    blue = []
    for processor in (CLIPImageProcessorPil(**edge), tower.preprocessor):
        own = Encoder(tower.model, processor)
        drawn = np.asarray(draw_encoder(encoder_attention(own, wide), own, wide).crop((16, 72, 240, 100)))
        blue.append((drawn[..., 2] > 200).mean() - (drawn[..., 0] > 200).mean())
    assert blue[0] == 1  # the middle third
    assert blue[1] < 0  # all of it


def test_strips_of_pictures_make_sheets_of_usual_size(encoder: Encoder) -> None:
    for size in ((1, 3000), (3000, 1)):
        strip = Image.new("RGB", size, "red")
        drawn = draw_encoder(encoder_attention(encoder, strip), encoder, strip)
        assert drawn.height < 700


def test_words_too_long_for_a_panel_and_no_words_at_all(shipped: Any, scene: Image.Image) -> None:
    model, processor = shipped
    found = word_attention(model, processor, [scene], "what color is the circle")
    long = copy.copy(vars(found)) | {"words": ("pneumonoultramicroscopicsilicovolcanoconiosis" * 3,)}
    assert draw_words(type(found)(**long), processor, [scene]).size == draw_words(found, processor, [scene]).size
    none = vars(found) | {"words": (), "maps": (found.maps[0][:0],)}
    assert draw_words(type(found)(**none), processor, [scene]).width == 16 + 2 * 240


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_draws_and_prints_what_the_functions_return(
    encoder: Encoder, shipped: Any, scene: Image.Image, tmp_path: Path
) -> None:
    done = invoke("attend", SCENE, "--layer", 3, "--output", tmp_path / "map.png", "--json")
    assert done.exit_code == 0, done.stderr
    printed, expected = json.loads(done.stdout), encoder_attention(encoder, scene, 3)
    assert list(printed) == ["pictures", "checkpoint", "layer", "layers", "query", "heads", "rollout", "mean"]
    for name in ("heads", "rollout", "mean"):
        np.testing.assert_allclose(printed[name], getattr(expected, name), atol=1e-6)
    assert (printed["checkpoint"], printed["layer"], printed["layers"]) == (str(VISION), 3, 4)
    with Image.open(tmp_path / "map.png") as written:
        assert written.format == "PNG"
        assert np.array_equal(np.asarray(written), np.asarray(draw_encoder(expected, encoder, scene)))

    question = "what color is the circle"
    done = invoke("attend", SCENE, SECOND, question, "-o", tmp_path / "words.png")
    assert (done.exit_code, done.stdout) == (0, "red\n")
    with Image.open(tmp_path / "words.png") as written:
        assert written.width == 16 + 2 * 240
    printed = json.loads(invoke("attend", SCENE, SECOND, question, "--json").stdout)
    assert printed["words"] == ["red"]
    assert printed["pictures"] == [str(SCENE), str(SECOND)]
    found = word_attention(*shipped, [scene, read_picture(SECOND)], question)
    for maps, more in zip(printed["maps"], found.maps, strict=True):
        np.testing.assert_allclose(maps, more, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Expected a file, and after it a question"),
        ((SCENE,), "Expected a file for the maps"),
        ((SCENE, "-o", "map.jpg"), "found 'map.jpg'"),
        ((SCENE, "-o", "nowhere/map.png"), "its folder does not exist"),
        (("missing.png", "--json"), "'missing.png' does not exist"),
        ((SCENE, SECOND, "--json"), "found the file 'examples/second.png'"),
        ((SCENE, "missing.jpg", "--json"), "'missing.jpg' does not exist"),
        ((SCENE, " ", "--json"), "The question is empty"),
        ((SCENE, "what color is it", "--layer", 2, "--json"), "leave one of them out"),
        ((SCENE, "--layer", 9, "--json"), "layers 1 to 4, found 9"),
        ((SCENE, "--checkpoint", "nowhere", "--json"), "The checkpoint 'nowhere' does not exist"),
        ((SCENE, "what color is it", "--checkpoint", VISION, "--json"), "does not answer questions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_told_in_a_sentence(arguments: tuple[object, ...], sentence: str) -> None:
    done = invoke("attend", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.fullmatch(r"Error: .*\.\n", done.stderr)
    assert sentence in done.stderr


def test_the_encoder_of_a_fused_model_is_shown_too() -> None:
    printed = json.loads(invoke("attend", SCENE, "--checkpoint", OMNI, "--json").stdout)
    expected = encoder_attention(load_encoder(OMNI, "image"), read_picture(SCENE))
    np.testing.assert_allclose(printed["heads"], expected.heads, atol=1e-6)


# --- The page ---------------------------------------------------------------------------------------------------------


def test_the_python_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path("docs/attention.md").read_text(encoding="utf-8")
    script = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    shown = re.findall(r"print\(.*\)  # (.*)$", script, re.MULTILINE)
    assert shown
    exec(compile(script, "docs/attention.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == shown

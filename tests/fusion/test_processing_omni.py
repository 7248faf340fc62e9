"""The processor: as many placeholders as tokens, or an error with both numbers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, CLIPImageProcessor

from omni import OmniImageProcessor, OmniProcessor
from omni.checkpoints.seal import reseal
from omni.fusion import processing_omni
from omni.fusion.chats import OldTransformers

Pair = Callable[..., tuple[Any, OmniProcessor]]


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 20, 3), dtype=np.uint8))


@pytest.fixture
def processor(make_pair: Pair) -> OmniProcessor:
    return make_pair()[1]


def counts(processor: OmniProcessor, inputs: Any) -> list[int]:
    return [list(row).count(processor.image_token_id) for row in inputs["input_ids"]]


# --- Counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["linear", "mlp", "unshuffle_mlp"])
@pytest.mark.parametrize("output", ["cls", "grid", "cls+grid"])
def test_as_many_placeholders_as_the_model_makes_tokens(make_pair: Pair, output: str, projector: str) -> None:
    factor = 2 if projector == "unshuffle_mlp" else 1
    model, processor = make_pair(output=output, projector=projector, factor=factor)
    inputs = processor(text=["<image> a <image>", "b", "<image>"], images=[photo(i) for i in range(3)], padding=True)
    made = processor(text="<image> a", images=photo(), return_tensors="pt")
    features = model.get_image_features(made["pixel_values"]).pooler_output
    assert counts(processor, made) == [len(features[0])]
    assert counts(processor, inputs) == [2 * len(features[0]), 0, len(features[0])]
    model(**made)


def test_a_file_has_the_same_pixels_whichever_way_it_comes(processor: OmniProcessor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image, path = photo(), tmp_path / "phone.png"
    image.rotate(90, expand=True).save(path, exif=exif)
    clip = type(CLIPImageProcessor())(size={"height": 16, "width": 16}, do_center_crop=False)
    for image_processor in (processor.image_processor, clip):
        processor.image_processor = image_processor
        expected = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
        for way in (str(path), path, Image.open(path), [Image.open(path)], [[str(path)]]):
            assert processor(text="<image>", images=way, return_tensors="pt")["pixel_values"].equal(expected)
        for block in ({"path": str(path)}, {"image": Image.open(path)}):
            chat = [{"role": "user", "content": [{"type": "image", **block}]}]
            made = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
            assert made["pixel_values"].equal(expected)


def test_pictures_flat_nested_or_alone(processor: OmniProcessor) -> None:
    a, b, c = (photo(i) for i in range(3))
    text = ["<image><image>", "x", "<image>"]
    flat = processor(text=text, images=[a, b, c], padding=True, return_tensors="pt")
    nested = processor(text=text, images=[[a, b], [], [c]], padding=True, return_tensors="pt")
    assert flat.keys() == nested.keys()
    for key in flat:
        assert flat[key].equal(nested[key]), key
    alone = processor(text="<image>", images=a, return_tensors="pt")
    assert alone["pixel_values"].equal(flat["pixel_values"][:1])
    assert processor(text="<image>", images=[[a]], return_tensors="pt")["pixel_values"].equal(alone["pixel_values"])


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image>", None, r"<image> tokens .* items of modality 'image', found 1 \(by row: \[1\]\) and 0"),
        ("nothing", 1, r"found 0 \(by row: \[0\]\) and 1"),
        (["<image>", "<image><image>"], 2, r"found 3 \(by row: \[1, 2\]\) and 2"),
        ("<image>", 2, r"found 1 .* and 2"),
    ],
)
def test_items_and_placeholders_must_match(processor: OmniProcessor, text: Any, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[photo()] * images if images else None)


@pytest.mark.parametrize(("max_length", "left"), [(3, 2), (5, 4)])
def test_truncation_never_cuts_a_picture(processor: OmniProcessor, max_length: int, left: int) -> None:
    with pytest.raises(
        ValueError, match=rf"row 0: the text has 5 placeholders <image>, the {max_length} .* only {left}"
    ):
        processor(text="a<image>", images=photo(), truncation=True, max_length=max_length)


def test_truncation_may_cut_text(processor: OmniProcessor) -> None:
    inputs = processor(text="<image> a red circle", images=photo(), truncation=True, max_length=7)
    assert len(inputs["input_ids"][0]) == 7
    assert counts(processor, inputs) == [5]


@pytest.mark.parametrize("name", ["cls", "grid"])
def test_a_picture_that_does_not_fold(make_pair: Pair, name: str) -> None:
    _, processor = make_pair(output=name, projector="unshuffle_mlp", factor=4)
    if name == "cls":
        assert counts(processor, processor(text="<image>", images=photo())) == [1]
        return
    with pytest.raises(ValueError, match="grid of 2x2 patches is not divisible by 4"):
        processor(text="<image>", images=photo())


def test_nothing_to_do(processor: OmniProcessor) -> None:
    with pytest.raises(ValueError, match="text, items of a modality, or both"):
        processor()
    with pytest.raises(ValueError, match="must be a string"):
        processor(text=[1, 2])
    assert processor(images=photo(), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)
    assert list(processor(text="a")["input_ids"][0]) == processor.tokenizer("a")["input_ids"]


def test_batch_decode_gives_the_text_back(processor: OmniProcessor) -> None:
    ids = processor(text=["a red <image> circle"], images=photo())["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a red  circle"]


# --- Chats ------------------------------------------------------------------------------------------------------------


def chat(*content: dict[str, Any], answer: str | None = None) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": list(content)}]
    return messages + ([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else [])


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def test_a_chat_with_pictures(processor: OmniProcessor, tmp_path: Path) -> None:
    photo(1).save(tmp_path / "a.png")
    image = {"type": "image", "image": photo()}
    file = {"type": "image", "path": str(tmp_path / "a.png")}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat(image, file, text("how many")), **options)
    expected = processor(
        text="<|user|><image><image>how many<|assistant|>", images=[photo(), photo(1)], return_tensors="pt"
    )
    assert inputs["input_ids"].equal(expected["input_ids"])
    assert inputs["pixel_values"].equal(expected["pixel_values"])
    rows = [chat(image, text("what")), chat(text("what"))]
    assert counts(processor, processor.apply_chat_template(rows, padding=True, **options)) == [5, 0]


def test_the_mask_of_what_the_assistant_says(processor: OmniProcessor) -> None:
    inputs = processor.apply_chat_template(
        chat({"type": "image", "image": photo()}, text("how many"), answer="blue square"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    spoken = inputs["input_ids"][inputs["assistant_masks"].bool()]
    assert processor.decode(spoken) == "blue square<|end|>"
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape


def test_a_placeholder_in_a_users_text_is_text(processor: OmniProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise whoever writes `<image>` breaks the count, or puts a picture where none belongs."""
    image = {"type": "image", "image": photo()}
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with pytest.raises(ValueError, match="found 2 .* and 1"):
        processor.apply_chat_template(chat(image, text("is <image> a tag?")), **options)
    options |= {"sanitize_control_tokens": True}
    if processing_omni.UNMARKED:
        inputs = processor.apply_chat_template(chat(image, text("is <image> a tag?")), **options)
        assert counts(processor, inputs) == [5]
        assert "is <image> a tag?" in processor.decode(inputs["input_ids"][0])
    monkeypatch.setattr(processing_omni, "UNMARKED", "")  # as with an older transformers
    assert counts(processor, processor.apply_chat_template(chat(image, text("is it a tag?")), **options)) == [5]
    for token in ("<image>", "<|end|>"):
        for chats in (chat(image, text(f"is {token} a tag?")), [chat(text("what")), chat(text(f"is it {token}?"))]):
            with pytest.raises(
                OldTransformers, match=f"the control token '{re.escape(token)}' in a text, which transf"
            ):
                processor.apply_chat_template(chats, **options)


# --- What tools ask ---------------------------------------------------------------------------------------------------


def test_tools_find_what_they_look_for(processor: OmniProcessor) -> None:
    assert processor.image_token == "<image>"
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert processor.model_input_names == [*processor.tokenizer.model_input_names, "pixel_values"]
    assert isinstance(processor.image_processor, OmniImageProcessor)
    other = OmniImageProcessor(size={"height": 16, "width": 16}, do_normalize=False)
    processor.image_processor = other
    assert processor.preprocessors["image"] is other
    assert not hasattr(processor, "audio_processor")
    reserved = processor._get_num_multimodal_tokens(image_sizes=[(100, 50), (16, 16)])
    assert reserved.num_image_tokens == [5, 5]


def test_types_of_tokens_and_offsets(processor: OmniProcessor) -> None:
    inputs = processor(
        text="a <image> b",
        images=photo(),
        text_kwargs={"return_mm_token_type_ids": True, "return_text_replacement_offsets": True},
    )
    types = inputs["mm_token_type_ids"][0]
    assert [i for i, kind in enumerate(types) if kind] == [
        i for i, token in enumerate(inputs["input_ids"][0]) if token == processor.image_token_id
    ]
    (span,) = inputs["text_replacement_offsets"][0]
    assert (span["type"], span["span"], span["replacement"]) == ("image", (2, 9), "<image>" * 5)


def test_settings_for_one_call(processor: OmniProcessor) -> None:
    plain = processor(images=photo(), return_tensors="pt")["pixel_values"]
    raw = processor(images=photo(), return_tensors="pt", images_kwargs={"do_normalize": False})["pixel_values"]
    torch.testing.assert_close((raw - 0.5) / 0.5, plain)


# --- On disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_pair: Pair, tmp_path: Path) -> Path:
    for part in make_pair(projector="unshuffle_mlp", factor=2):
        part.save_pretrained(tmp_path)
    return tmp_path


def test_comes_back_from_disk(folder: Path) -> None:
    first, second = OmniProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert isinstance(second, OmniProcessor)
    saved = json.loads((folder / "processor_config.json").read_text())
    assert saved.pop("auto_map") == {"AutoProcessor": "omni_remote.OmniProcessor"}
    assert saved["image_processor"].pop("auto_map") == {"AutoImageProcessor": "omni_remote.OmniImageProcessor"}
    assert first.to_dict() == second.to_dict() == saved
    assert first.modalities["image"]["factor"] == 2
    assert first.chat_template == second.tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    assert AutoImageProcessor.from_pretrained(folder).to_dict() == first.image_processor.to_dict()
    for processor in (first, second):
        assert counts(processor, processor(text="<image>", images=photo())) == [2]


def test_from_a_folder_of_its_own_and_a_subfolder(folder: Path, tmp_path: Path) -> None:
    processor = OmniProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "deep" / "inside")
    again = OmniProcessor.from_pretrained(tmp_path / "deep", subfolder="inside")
    assert again.to_dict() == processor.to_dict()


def test_settings_at_loading(folder: Path) -> None:
    processor = OmniProcessor.from_pretrained(folder, do_normalize=False, padding_side="right")
    assert not processor.image_processor.do_normalize
    assert processor.tokenizer.padding_side == "right"


def test_the_image_processor_of_another_tower(make_pair: Pair, tmp_path: Path) -> None:
    model, processor = make_pair()
    size = {"height": 16, "width": 16}
    processor.image_processor = type(CLIPImageProcessor(size=size))(size=size, crop_size=size)
    processor.save_pretrained(tmp_path)
    again = OmniProcessor.from_pretrained(tmp_path)
    assert type(again.image_processor) is type(processor.image_processor)
    inputs = [p(text="<image>", images=photo(), return_tensors="pt")["pixel_values"] for p in (processor, again)]
    assert inputs[0].equal(inputs[1])


def change(folder: Path, file: str, **values: Any) -> None:
    """Write `values` into a JSON file; "a.b" is b inside a."""
    content = json.loads((folder / file).read_text())
    for key, value in values.items():
        *path, last = key.split("__")
        inner = content
        for part in path:
            inner = inner[part]
        inner[last] = value
    (folder / file).write_text(json.dumps(content))
    reseal(folder)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("modalities__image__output", "cls", "image.output"),
        ("modalities__image__factor", 1, "image.factor"),
        ("modalities__image__token_id", 5, "image.token_id"),
        ("image_config__patch_size", 4, "image.patch_size"),
        ("image_config__image_size", 32, "image.image_size"),
    ],
)
def test_processor_and_model_that_drifted_apart(folder: Path, key: str, value: Any, shown: str) -> None:
    change(folder, "config.json", **{key: value})
    with pytest.raises(ValueError, match=rf"processor and model disagree: .*'{shown}'.* not saved together"):
        OmniProcessor.from_pretrained(folder)


def test_a_preprocessor_that_nobody_knows(folder: Path) -> None:
    change(folder, "processor_config.json", image_processor__image_processor_type="TheirImageProcessor")
    with pytest.raises(ValueError, match=r"'image' was saved as TheirImageProcessor, .* registered one is OmniImage"):
        OmniProcessor.from_pretrained(folder)


def test_a_folder_without_a_processor(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError), match="processor_config.json"):
        OmniProcessor.from_pretrained(tmp_path)


def test_a_tokenizer_without_the_placeholder() -> None:
    from omni.training.tokenizer import train_tokenizer

    bare = train_tokenizer(["a b"], 270, {})
    with pytest.raises(
        ValueError, match=r"'<image>' of modality 'image' must be one token of the tokenizer; it is \d+"
    ):
        OmniProcessor(tokenizer=bare)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        OmniProcessor()


def test_a_preprocessor_without_its_modality(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"Preprocessors for \['sound'\], but the modalities are \['image'\]"):
        OmniProcessor(tokenizer=tokenizer, preprocessors={"sound": object()})
    text_only = OmniProcessor(tokenizer=tokenizer, modalities={})
    assert not hasattr(text_only, "image_processor")
    with pytest.raises(ValueError, match=r"takes no images; its modalities are \[\]"):
        text_only(text="a", images=photo())

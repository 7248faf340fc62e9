"""Sounds in the fused model: beside pictures, in chats, at any rate, through our encoder and those of transformers."""

import base64
import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ASTFeatureExtractor,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
    pipeline,
)

from omni import (
    OmniConfig,
    OmniFeatureExtractor,
    OmniForConditionalGeneration,
    OmniImageProcessor,
    OmniProcessor,
    registry,
)
from omni.audio.sound import Sound, SoundError
from omni.audio.sounds import read_sound
from omni.fusion import processing_omni
from omni.fusion.chats import OldTransformers
from omni.registry import get_modality
from omni.training.tokenizer import train_tokenizer

from .conftest import chirp, file_of

AUDIO: dict[str, Any] = {
    "model_type": "omni_audio", "num_mel_bins": 20, "time_reduction": 8, "hidden_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "model_type": "omni_vision", "image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
TOKENS = {"image": "<image>", "audio": "<audio>"}
TEXTS = ["what is that", "which of them", "a red circle"] * 4


@pytest.fixture(scope="module", autouse=True)
def _undone() -> Iterator[None]:
    with registry.temporary():
        yield


def build(
    audio: dict[str, Any] = AUDIO, extractor: Any = None, **section: Any
) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    tokenizer = train_tokenizer(TEXTS, 300, TOKENS)
    given = {"output": "cls+grid", "projector": "mlp"}
    sections = {"image": {"encoder": IMAGE, **given}, "audio": {"encoder": audio, **given, **section}}
    for name, values in sections.items():
        values["token_id"] = tokenizer.convert_tokens_to_ids(TOKENS[name])
    text = {"model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(OmniConfig(modalities=copy.deepcopy(sections), text_config=text)).eval()
    preprocessors = {"image": OmniImageProcessor(size={"height": 16, "width": 16})}
    preprocessors["audio"] = extractor or OmniFeatureExtractor(num_mel_bins=20)
    processor = OmniProcessor(tokenizer=tokenizer, preprocessors=preprocessors, modalities=model.config.modalities)
    return model, processor


Pair = tuple[OmniForConditionalGeneration, OmniProcessor]


@pytest.fixture(scope="module")
def pair(_undone: None) -> Pair:
    return build()


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 20, 3), dtype=np.uint8))


def counts(processor: OmniProcessor, inputs: Any, token: str = "<audio>") -> list[int]:
    token_id = processor.tokenizer.convert_tokens_to_ids(token)
    return [list(row).count(token_id) for row in inputs["input_ids"]]


def tokens(samples: int) -> int:
    """CLS, and a token for every 8 begun frames."""
    return 1 + -(-(1 + samples // 160) // 8)


CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def said(*content: Any) -> list[dict[str, Any]]:
    blocks = [{"type": "text", "text": block} if isinstance(block, str) else block for block in content]
    return [{"role": "user", "content": blocks}]


# --- The bundle -------------------------------------------------------------------------------------------------------


def test_the_bundle_opens_files_and_shows_them(tmp_path: Path) -> None:
    bundle = get_modality("audio")
    path = tmp_path / "a.wav"
    path.write_bytes(file_of(chirp()))
    sound = bundle.open(path)
    assert (bundle.noun, bundle.argument, bundle.token) == ("sound", "audio", "<audio>")
    assert path.suffix in bundle.suffixes
    for form in (sound, str(path), (chirp(), 16_000), {"array": chirp(), "sampling_rate": 16_000}):
        assert bundle.is_item(form)
        assert bundle.show(form).size == (320, 192)
    with pytest.raises(SoundError, match="expected a WAV, FLAC, Ogg or MP3 sound"):
        bundle.open(b"hello")


def test_opening_a_sound_waits_for_no_model() -> None:
    code = "import omni, sys; from omni.registry import open_item; open_item('audio'); "
    code += "print(*{'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


# --- The processor ----------------------------------------------------------------------------------------------------


def test_as_many_placeholders_as_the_model_makes_tokens(pair: Pair) -> None:
    model, processor = pair
    lengths = [8_000, 100, 3_000]
    sounds = [chirp()[:length] for length in lengths]
    text = ["<audio> a <image> <audio>", "b", "<image><audio>"]
    inputs = processor(text=text, images=[photo(), photo(1)], audio=sounds, padding=True, return_tensors="pt")
    expected = [tokens(length) for length in lengths]
    assert counts(processor, inputs) == [expected[0] + expected[1], 0, expected[2]]
    assert counts(processor, inputs, "<image>") == [5, 0, 5]
    assert {"audio_features", "audio_mask", "pixel_values"} <= {*inputs}
    features = model.get_audio_features(inputs["audio_features"], inputs["audio_mask"]).pooler_output
    assert [len(each) for each in features] == expected
    with torch.no_grad():
        together = model(**inputs).logits
        alone = processor(text=text[2], images=photo(1), audio=sounds[2], return_tensors="pt")
        logits = model(**alone).logits[0]
    real = inputs["attention_mask"][2].bool()
    torch.testing.assert_close(together[2][real], logits, rtol=0, atol=1e-5)


def test_sounds_flat_nested_or_alone(pair: Pair) -> None:
    _, processor = pair
    a, b, c = (chirp(seed=seed) for seed in range(3))
    text = ["<audio><audio>", "a", "<audio>"]
    flat = processor(text=text, audio=[a, b, c], padding=True, return_tensors="pt")
    nested = processor(text=text, audio=[[a, b], [], [c]], padding=True, return_tensors="pt")
    pairs = processor(text=text, audio=[(a, 16_000), Sound(b, 16_000), c.tolist()], padding=True, return_tensors="pt")
    for key in flat:
        assert flat[key].equal(nested[key]), key
        assert flat[key].equal(pairs[key]), key
    for one in (
        a,
        a.tolist(),
        (a, 16_000),
        {"array": a, "sampling_rate": 16_000},
        Sound(a, 16_000),
        torch.from_numpy(a),
    ):
        alone = processor(text="<audio>", audio=one, return_tensors="pt")
        assert alone["audio_features"].equal(flat["audio_features"][:1])
    with pytest.raises(ValueError, match=r"items of modality 'audio', found 1 \(by row: \[1\]\) and 2"):
        processor(text="<audio>", audio=[a, b])


def test_the_rate_is_honoured_or_refused(pair: Pair) -> None:
    _, processor = pair
    samples = chirp(rate=8_000)
    expected = processor(text="<audio>", audio=Sound(samples, 8_000), return_tensors="pt")["audio_features"]
    for options in ({"sampling_rate": 8_000}, {"audio_kwargs": {"sampling_rate": 8_000}}):
        found = processor(text="<audio>", audio=samples, return_tensors="pt", **options)
        assert found["audio_features"].equal(expected)
    processor(text="<audio>", audio=samples, sampling_rate=8_000, audio_kwargs={"sampling_rate": 8_000})
    with pytest.raises(SoundError, match="comes with 8,000 samples per second, but `sampling_rate` says 16,000"):
        processor(text="<audio>", audio=(samples, 8_000), sampling_rate=16_000)
    with pytest.raises(ValueError, match="given as 8000 and, in `audio_kwargs`, as 16000"):
        processor(text="<audio>", audio=samples, sampling_rate=8_000, audio_kwargs={"sampling_rate": 16_000})
    with pytest.raises(TypeError, match="knows no 'truncation'"):
        processor(text="<audio>", audio=samples, audio_kwargs={"truncation": True})
    blind = train_tokenizer(TEXTS, 300, {"image": "<image>"})
    seeing = OmniProcessor(tokenizer=blind, modalities={"image": {"encoder": IMAGE}})
    with pytest.raises(ValueError, match=r"`sampling_rate` is of sounds; this processor takes \['image'\]"):
        seeing(text="a", sampling_rate=8_000)


@pytest.mark.new_chats
def test_chats_with_sounds_and_pictures(pair: Pair, tmp_path: Path) -> None:
    _, processor = pair
    path = tmp_path / "a.flac"
    path.write_bytes(file_of(chirp(rate=22_050), 22_050, "FLAC"))
    sound, samples = read_sound(path), chirp(seed=1, rate=8_000)
    blocks = [
        {"type": "audio", "audio": sound},
        {"type": "image", "image": photo()},
        {"type": "audio", "path": str(path)},
        {"type": "audio", "url": str(path)},
        {"type": "audio", "audio": str(path)},
        {"type": "audio", "audio": (samples, 8_000)},
        {"type": "audio", "audio": samples, "sampling_rate": 8_000},
    ]
    inputs = processor.apply_chat_template(said(*blocks, "what is that"), **CHAT)
    other = Sound(samples, 8_000)
    expected = processor(
        text="<|user|><audio><image><audio><audio><audio><audio><audio>what is that<|assistant|>",
        audio=[sound, sound, sound, sound, other, other],
        images=photo(),
        return_tensors="pt",
    )
    assert inputs.keys() == expected.keys()
    for key in inputs:
        assert inputs[key].equal(expected[key]), key
    rows = [said(blocks[0], "a"), said("a"), said(blocks[1], blocks[4])]
    batch = processor.apply_chat_template(rows, padding=True, **CHAT)
    assert counts(processor, batch) == [tokens(8_000), 0, tokens(8_000)]


def test_chats_with_sounds_need_a_new_transformers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = pair
    monkeypatch.setattr(processing_omni, "UNMARKED", "")  # as with an older one
    chat = said({"type": "image", "image": photo()}, {"type": "audio", "audio": chirp(rate=8_000)}, "a")
    with pytest.raises(
        OldTransformers, match=r"has items of type 'audio', which transformers .* install transformers 5\.23"
    ):
        processor.apply_chat_template([chat, chat], **CHAT)


@pytest.mark.new_chats
def test_the_rate_of_a_chats_arrays(pair: Pair) -> None:
    _, processor = pair
    samples = chirp(rate=8_000)
    chat = said({"type": "audio", "audio": samples})
    expected = processor(text="<audio>", audio=Sound(samples, 8_000), return_tensors="pt")["audio_features"]
    for options in ({"sampling_rate": 8_000}, {"audio_kwargs": {"sampling_rate": 8_000}}):
        found = processor.apply_chat_template(chat, **CHAT, processor_kwargs=options)["audio_features"]
        assert found.equal(expected)
    with pytest.raises(SoundError, match="says 44,100"):
        named = said({"type": "audio", "audio": (samples, 8_000)})
        processor.apply_chat_template(named, **CHAT, processor_kwargs={"sampling_rate": 44_100})


@pytest.mark.new_chats
def test_sounds_from_addresses(pair: Pair, tmp_path: Path) -> None:
    """As transformers' own chats have them; what is behind one is loaded at the rate of the feature extractor."""
    _, processor = pair
    data = file_of(chirp(rate=8_000), 8_000)
    address = f"data:audio/wav;base64,{base64.b64encode(data).decode()}"
    expected = processor(text="<audio>", audio=read_sound(data), return_tensors="pt")
    for block in ({"url": address}, {"path": address}, {"audio": address}):
        found = processor.apply_chat_template(said({"type": "audio", **block}), **CHAT)
        torch.testing.assert_close(found["audio_features"], expected["audio_features"])
    with pytest.raises(SoundError, match="'127.0.0.1' is this machine or in a private network"):
        processor.apply_chat_template(said({"type": "audio", "url": "http://127.0.0.1:9/a.wav"}), **CHAT)
    with pytest.raises(SoundError, match="does not exist"):
        processor.apply_chat_template(said({"type": "audio", "path": str(tmp_path / "none.wav")}), **CHAT)


@pytest.mark.new_chats
def test_pipelines_take_sounds_in_every_form(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # of torchvision nothing is used
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    for part in pair:
        part.save_pretrained(tmp_path)
    model, processor = AutoModelForMultimodalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(model) is OmniForConditionalGeneration
    pipe = pipeline("any-to-any", model=model, processor=processor, device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 4, "return_full_text": False}
    path, samples, prompt = tmp_path / "a.wav", chirp(rate=8_000), "<|user|><audio>what is that<|assistant|>"
    path.write_bytes(file_of(samples, 8_000, subtype="FLOAT"))
    inputs = processor(text=prompt, audio=Sound(samples, 8_000), return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(written, skip_special_tokens=True)
    forms = [str(path), (samples, 8_000), {"array": samples, "sampling_rate": 8_000}, [Sound(samples, 8_000)]]
    for form in forms:
        assert pipe(text=prompt, audio=form, **options)[0]["generated_text"] == expected
    assert pipe(text=prompt, audio=samples, sampling_rate=8_000, **options)[0]["generated_text"] == expected
    several = pipe(text=[prompt] * 2, audio=[str(path), (samples, 8_000)], batch_size=2, **options)
    assert [answer["generated_text"] for answer in several] == [expected] * 2
    chat = said({"type": "audio", "path": str(path)}, "what is that")
    assert pipe(text=chat, **options)[0]["generated_text"] == expected


def test_a_processor_of_its_parts(pair: Pair) -> None:
    """Under transformers' names: what is given decides what it takes."""
    _, processor = pair
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": OmniFeatureExtractor(num_mel_bins=20)}
    hearing = OmniProcessor(**parts)
    assert list(hearing.preprocessors) == ["audio"]
    assert hearing.feature_extractor is parts["feature_extractor"]
    assert list(OmniProcessor(**parts, image_processor=processor.image_processor).preprocessors) == ["audio", "image"]
    with pytest.raises(ValueError, match=r"takes no images; its modalities are \['audio'\]"):
        hearing(text="a", images=photo())
    seeing = OmniProcessor(tokenizer=processor.tokenizer, image_processor=processor.image_processor)
    with pytest.raises(ValueError, match=r"takes no audio; its modalities are \['image'\]"):
        seeing(text="a", audio=chirp())


@pytest.mark.parametrize("case", ["ours", "whisper", "ast", "wav2vec2"])
def test_the_tokens_of_lengths_are_told(case: str) -> None:
    """Before there is a sound, and for each in a batch."""
    _, processor = build() if case == "ours" else build(CASES[case][0], CASES[case][1]())
    lengths = [16_000, 1_000, 8_050]
    sounds = [np.zeros(length, np.float32) for length in lengths]
    inputs = processor(text=["<audio>"] * 3, audio=sounds, padding=True, return_tensors="pt")
    assert processor._get_num_multimodal_tokens(audio_lengths=lengths)["num_audio_tokens"] == counts(processor, inputs)
    written = [processor.replace_audio_token(inputs, index) for index in range(3)]
    assert written == ["<audio>" * count for count in counts(processor, inputs)]
    assert min(counts(processor, inputs)) >= processor.least_tokens("audio")


def test_token_types_are_those_of_transformers(pair: Pair) -> None:
    _, processor = pair
    assert (processor.audio_token, processor.image_token) == ("<audio>", "<image>")
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in TOKENS.values()}
    assert {processor.audio_token: processor.audio_token_id, processor.image_token: processor.image_token_id} == ids
    inputs = processor(
        text="a<image><audio>", images=photo(), audio=chirp(), return_mm_token_type_ids=True, return_tensors="pt"
    )
    types = inputs["mm_token_type_ids"]
    assert torch.equal(types == 3, inputs["input_ids"] == ids["<audio>"])
    assert torch.equal(types == 1, inputs["input_ids"] == ids["<image>"])


def test_the_preprocessors_are_where_tools_look(pair: Pair) -> None:
    _, processor = build()
    assert processor.feature_extractor is processor.preprocessors["audio"]
    assert processor.image_processor is processor.preprocessors["image"]
    processor.feature_extractor = other = OmniFeatureExtractor(num_mel_bins=20, hop_length=80)
    assert processor.preprocessors["audio"] is other


# --- The model --------------------------------------------------------------------------------------------------------


def test_what_is_heard_decides_what_is_written(pair: Pair) -> None:
    model, processor = pair
    text, given = ["<audio>what is that", "<image><audio>which of them"], {"images": photo(), "padding": True}
    inputs = processor(text=text, audio=[chirp(), chirp(0.1)], return_tensors="pt", **given)
    other = processor(text=text, audio=[chirp(seed=3), chirp(0.1)], return_tensors="pt", **given)
    with torch.no_grad():
        first, second = model(**inputs).logits, model(**other).logits
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for options in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}):
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False, **options).shape[1] >= 3
    encoded = model.model.encode_items("audio", **{key: inputs[key] for key in ("audio_features", "audio_mask")})
    again = processor(text=text, audio=encoded, return_tensors="pt", **given)
    assert again["input_ids"].equal(inputs["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**again).logits, first, rtol=0, atol=1e-5)


def test_training_reaches_every_part(pair: Pair) -> None:
    model, processor = build()
    inputs = processor(
        text=["<audio><image>a", "<audio>a"],
        images=photo(),
        audio=[chirp(), chirp(0.2)],
        padding=True,
        return_tensors="pt",
    )
    model.enable_input_require_grads()  # as adapters do for checkpoints of activations
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("output", ["cls", "grid"])
def test_parts_of_the_output(output: str) -> None:
    model, processor = build(output=output, projector="linear")
    inputs = processor(text=["<audio>", "<audio>a"], audio=[chirp(), chirp(0.1)], padding=True, return_tensors="pt")
    assert counts(processor, inputs) == ([1, 1] if output == "cls" else [tokens(8_000) - 1, tokens(1_600) - 1])
    assert model(**inputs).logits.isfinite().all()


def test_odd_lengths_are_folded_and_rounded_up() -> None:
    model, processor = build(projector="unshuffle_mlp", factor=4)
    lengths = [8_000, 100, 3_000]
    sounds = [chirp()[:length] for length in lengths]
    inputs = processor(text=["<audio>" * 2, "<audio>"], audio=sounds, padding=True, return_tensors="pt")
    expected = [1 + -(-(tokens(length) - 1) // 4) for length in lengths]
    assert expected == [3, 2, 2]
    assert counts(processor, inputs) == [5, 2]
    with torch.no_grad():
        together = model.get_audio_features(inputs["audio_features"], inputs["audio_mask"]).pooler_output
        for sound, found in zip(sounds, together, strict=True):
            one = processor(text="<audio>", audio=sound, return_tensors="pt")
            alone = model.get_audio_features(one["audio_features"], one["audio_mask"]).pooler_output[0]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
        assert model(**inputs).logits.isfinite().all()


def test_saved_and_loaded_nothing_differs(pair: Pair, tmp_path: Path) -> None:
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = (
        OmniForConditionalGeneration.from_pretrained(tmp_path).eval(),
        AutoProcessor.from_pretrained(tmp_path),
    )
    items = {"audio": chirp(), "images": photo()}
    inputs, before = (
        each(text="<audio><image>which of them", **items, return_tensors="pt") for each in (reader, processor)
    )
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**before).logits)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(extractor) is OmniFeatureExtractor
    assert extractor.num_mel_bins == 20
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written["feature_extractor"]["feature_extractor_type"] == "OmniFeatureExtractor"
    tower = get_modality("audio").model_class.from_pretrained(tmp_path)  # of the fused model's folder, the tower
    for name, value in tower.state_dict().items():
        assert torch.equal(value, model.model.audio_tower.state_dict()[name]), name


def test_a_modality_may_be_left_out_when_it_is_loaded(pair: Pair, tmp_path: Path) -> None:
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    deaf = OmniProcessor.from_pretrained(tmp_path, modalities={"audio": None})
    assert deaf.audio_token is None
    assert not hasattr(deaf, "feature_extractor")
    assert list(deaf(text="<image>", images=photo())) == ["input_ids", "attention_mask", "pixel_values"]


# --- Encoders of transformers -----------------------------------------------------------------------------------------

WHISPER: dict[str, Any] = {
    "model_type": "whisper", "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 20, "num_mel_bins": 20,
    "max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
SPECTROGRAM: dict[str, Any] = {
    "model_type": "audio-spectrogram-transformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "num_mel_bins": 20, "max_length": 100, "patch_size": 8, "frequency_stride": 6,
    "time_stride": 10,
}  # fmt: skip
WAVES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": [8, 8],
    "conv_kernel": [10, 3], "conv_stride": [80, 4], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "whisper": (WHISPER, lambda: WhisperFeatureExtractor(20, chunk_length=1), lambda s: (1 + (s - 1) // 160 + 1) // 2),
    "ast": (SPECTROGRAM, lambda: ASTFeatureExtractor(num_mel_bins=20, max_length=100), lambda s: 3 * 10),
    "wav2vec2": (
        {"model_type": "wav2vec2", **WAVES},
        lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True),
        lambda s: ((s - 10) // 80 + 1 - 3) // 4 + 1,
    ),
    "hubert": (
        {"model_type": "hubert", **WAVES},
        lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True),
        lambda s: ((s - 10) // 80 + 1 - 3) // 4 + 1,
    ),
}
"""An encoder, its feature extractor, and the tokens that it makes of so many samples."""


@pytest.mark.parametrize("case", CASES)
def test_an_encoder_of_transformers_in_the_place_of_ours(case: str, tmp_path: Path) -> None:
    encoder, extractor, expected = CASES[case]
    model, processor = build(encoder, extractor())
    text, sounds = ["<audio>what is that", "<image><audio>a"], [Sound(chirp(rate=8_000), 8_000), chirp()[:3_000]]
    inputs = processor(text=text, images=photo(), audio=sounds, padding=True, return_tensors="pt")
    assert counts(processor, inputs) == [1 + expected(8_000), 1 + expected(3_000)]
    with torch.no_grad():
        logits = model(**inputs).logits
        alone = processor(text=text[1], images=photo(), audio=sounds[1], return_tensors="pt")
        torch.testing.assert_close(
            logits[1][inputs["attention_mask"][1].bool()], model(**alone).logits[0], rtol=0, atol=1e-5
        )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = (
        OmniForConditionalGeneration.from_pretrained(tmp_path).eval(),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert type(reader.feature_extractor) is type(extractor())
    with torch.no_grad():
        found = again(**reader(text=text, images=photo(), audio=sounds, padding=True, return_tensors="pt"))
    assert torch.equal(found.logits, logits)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > 2


@torch.no_grad()
def test_a_tower_computes_what_the_model_of_transformers_does() -> None:
    for case, (encoder, extractor, expected) in CASES.items():
        model, processor = build(encoder, extractor())
        tower = model.model.audio_tower
        plain = AutoModel.from_config(tower.config).eval()
        plain = plain.encoder if case == "whisper" else plain
        plain.load_state_dict(tower.state_dict())
        inputs = processor(audio=[chirp()], return_tensors="pt")
        theirs = plain(inputs["audio_features"]).last_hidden_state
        found = tower(inputs["audio_features"], inputs["audio_mask"])
        n = expected(8_000)
        grid = theirs[:, 2:] if case == "ast" else theirs[:, :n]
        torch.testing.assert_close(found.grid[:, :n], grid, msg=case)
        torch.testing.assert_close(found.cls, theirs[:, :1] if case == "ast" else grid.mean(1, keepdim=True), msg=case)
        assert not hasattr(tower, "decoder")


def test_what_transformers_makes_of_its_own_configurations_stays() -> None:
    small = {key: value for key, value in WHISPER.items() if key != "model_type"}
    assert type(AutoModel.from_config(WhisperConfig(**small))) is WhisperModel


def test_a_sound_that_a_feature_extractor_would_cut_is_refused() -> None:
    for case in ("whisper", "ast"):
        _, processor = build(CASES[case][0], CASES[case][1]())
        with pytest.raises(SoundError, match="1.5 s is too large for this encoder, which takes 1.0 s") as error:
            processor(text="<audio>", audio=chirp(1.5))
        assert error.value.kind == "too large"
    _, processor = build(*CASES["wav2vec2"][:1], CASES["wav2vec2"][1]())
    with pytest.raises(ValueError, match="too short for this encoder"):
        processor(text="<audio>", audio=chirp()[:50])


def test_an_encoder_that_cannot_hear() -> None:
    with pytest.raises(ValueError, match="type 'omni_vision' cannot be an audio tower; expected omni_audio, whisper"):
        build(IMAGE)

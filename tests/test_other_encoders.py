"""Encoders of transformers as modalities of their own: speech for a Whisper, films for a VideoMAE, beside pictures.

Everything about them that a plug-in may choose is chosen otherwise than for pictures: the placeholder, the processor's
argument, the names of the batch, what an item is.
"""

import copy
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, VideoMAEConfig, VideoMAEModel, WhisperConfig, WhisperModel
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omni import Modality, OmniConfig, OmniForConditionalGeneration, OmniImageProcessor, OmniProcessor, registry
from omni.training.tokenizer import train_tokenizer

WHISPER: dict[str, Any] = {
    "model_type": "whisper", "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 20, "num_mel_bins": 8,
    "max_source_positions": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
VIDEO: dict[str, Any] = {
    "model_type": "videomae", "image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "hidden_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "use_mean_pooling": False,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "model_type": "omni_vision", "image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
TOKENS = {"image": "<image>", "speech": "<|speech|>", "film": "[film]"}


class SoundPreprocessor:
    """`(samples, rate)` -> float[I, 8, 20]."""

    model_input_names = ["input_features"]

    def __call__(self, items: Sequence[Any], return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        rows = [np.resize(np.asarray(samples, np.float32), (8, 20)) / rate for samples, rate in items]
        return BatchFeature({"input_features": np.stack(rows)}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        return {}


class FilmPreprocessor:
    """Arrays of 4 frames uint8[4, 16, 16, 3] -> float[I, 4, 3, 16, 16], under the name that pictures have."""

    model_input_names = ["pixel_values"]

    def __call__(self, items: Sequence[Any], return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        frames = np.stack([np.asarray(item, np.float32).transpose(0, 3, 1, 2) / 255 for item in items])
        return BatchFeature({"pixel_values": frames}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        return {}


def read_grid(encoded: Any, num_patches: int) -> dict[str, Any]:
    return {"grid": encoded.last_hidden_state[:, -num_patches:]}


def fixed_grid(key: str, *shape: int) -> Any:
    def grid_shapes(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
        return [shape] * len(inputs[key])

    return grid_shapes


speech = Modality(
    name="speech",
    token=TOKENS["speech"],
    argument="speech",
    is_item=lambda given: isinstance(given, tuple),
    inputs={"speech_features": "input_features"},
    config_class=WhisperConfig,
    model_class=WhisperEncoder,
    preprocessor_class=SoundPreprocessor,
    grid_shapes=fixed_grid("speech_features", 10),
    outputs=("grid",),
    read=read_grid,
)
film = Modality(
    name="film",
    token=TOKENS["film"],
    inputs={"film_values": "pixel_values"},
    config_class=VideoMAEConfig,
    model_class=VideoMAEModel,
    preprocessor_class=FilmPreprocessor,
    grid_shapes=fixed_grid("film_values", 2, 2, 2),
    grid_dims=3,
    outputs=("grid",),
    read=read_grid,
)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with registry.temporary():
        registry.register_modality(speech)
        registry.register_modality(film)
        yield


@pytest.fixture(scope="module")
def pair() -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    tokenizer = train_tokenizer(["what is that", "which of them"] * 4, 300, TOKENS)
    encoders = {"image": IMAGE, "speech": WHISPER, "film": VIDEO}
    sections = {
        name: {
            "encoder": encoder,
            "output": "grid",
            "projector": "mlp",
            "token_id": tokenizer.convert_tokens_to_ids(TOKENS[name]),
        }
        for name, encoder in encoders.items()
    }
    text = {"model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(OmniConfig(modalities=copy.deepcopy(sections), text_config=text)).eval()
    processor = OmniProcessor(
        tokenizer=tokenizer,
        preprocessors={"image": OmniImageProcessor(size={"height": 16, "width": 16})},
        modalities=model.config.modalities,
    )
    return model, processor


def chat() -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    content = [
        {"type": "film", "film": draw.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)},
        {"type": "text", "text": "which of them"},
        {"type": "speech", "speech": (draw.normal(size=300), 16_000)},
        {"type": "image", "image": picture},
        {"type": "speech", "speech": (draw.normal(size=200), 16_000)},
    ]
    return [{"role": "user", "content": content}]


def prompt(processor: OmniProcessor) -> dict[str, Any]:
    return dict(
        processor.apply_chat_template(
            chat(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


@pytest.mark.new_chats
def test_all_of_them_stand_in_one_prompt(pair: tuple[OmniForConditionalGeneration, OmniProcessor]) -> None:
    model, processor = pair
    inputs = prompt(processor)
    assert {*inputs} == {"input_ids", "attention_mask", "pixel_values", "speech_features", "film_values"}
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    assert inputs["speech_features"].shape == (2, 8, 20)
    assert inputs["film_values"].shape == (1, 4, 3, 16, 16)
    ids = inputs["input_ids"][0].tolist()
    counts = {name: ids.count(processor.tokenizer.convert_tokens_to_ids(token)) for name, token in TOKENS.items()}
    assert counts == {"image": 4, "speech": 20, "film": 8}
    with torch.no_grad():
        logits = model(**inputs).logits
        other = model(**{**inputs, "film_values": inputs["film_values"].flip(1)}).logits
    assert logits.isfinite().all()
    assert not torch.equal(logits, other)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == len(ids) + 3


def test_towers_are_those_of_the_bundles(pair: tuple[OmniForConditionalGeneration, OmniProcessor]) -> None:
    model, _ = pair
    assert type(model.model.speech_tower) is WhisperEncoder
    assert type(model.model.film_tower) is VideoMAEModel


def test_what_transformers_makes_of_its_own_configurations_stays() -> None:
    assert (
        type(AutoModel.from_config(WhisperConfig(**{k: v for k, v in WHISPER.items() if k != "model_type"})))
        is WhisperModel
    )


@pytest.mark.new_chats
def test_saved_and_loaded_nothing_differs(
    pair: tuple[OmniForConditionalGeneration, OmniProcessor], tmp_path: Path
) -> None:
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = OmniForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = prompt(AutoProcessor.from_pretrained(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**prompt(processor)).logits)


def test_a_block_that_the_template_does_not_know_is_refused(
    pair: tuple[OmniForConditionalGeneration, OmniProcessor],
) -> None:
    _, processor = pair
    unknown = [{"role": "user", "content": [{"type": "smell", "smell": 1}]}]
    with pytest.raises(Exception, match="A block is text or one of"):
        processor.apply_chat_template(unknown, tokenize=False)


def test_a_processor_says_what_it_holds(pair: tuple[OmniForConditionalGeneration, OmniProcessor]) -> None:
    _, processor = pair
    assert "- speech: <" in repr(processor)
    tokenizer = train_tokenizer(["what is that"] * 4, 300, {"speech": TOKENS["speech"]})
    section = {"encoder": WHISPER, "output": "grid", "projector": "mlp"}
    deaf = OmniProcessor(tokenizer=tokenizer, modalities={"speech": section})
    assert "image" not in repr(deaf).split("tokenizer")[0]


def test_asking_for_the_bundle_of_pictures_is_cheap() -> None:
    """Whoever only opens files waits for no model."""
    code = "from omni.registry import open_item; open_item('image')('examples/scene.png'); import omni, sys; "
    code += "print(*{'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", f"import omni; {code}"], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []

"""Encoders of sounds, ours and those of transformers, alone in a folder: embedded, composed and exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    LlamaConfig,
    LlamaForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from omni import OmniAudioConfig, OmniAudioModel, OmniFeatureExtractor, OmniForConditionalGeneration, OmniProcessor
from omni.embedding import EngineError, embed
from omni.exchange.compose import compose
from omni.loading.encoder import Encoder, load_encoder
from omni.training.tokenizer import train_tokenizer

from .conftest import chirp, file_of

SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
WHISPER = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
WHISPER |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64, "pad_token_id": 0}
WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WAVES = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
MAKE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "ours": lambda: (OmniAudioModel(OmniAudioConfig(**SMALL)), OmniFeatureExtractor()),
    "whisper": lambda: (WhisperModel(WhisperConfig(**WHISPER)), WhisperFeatureExtractor()),
    "wav2vec2": lambda: (
        Wav2Vec2Model(Wav2Vec2Config(**SMALL, **WAVES, feat_extract_norm="layer")),
        Wav2Vec2FeatureExtractor(return_attention_mask=True),
    ),
    "ast": lambda: (ASTModel(ASTConfig(**SMALL, max_length=200)), ASTFeatureExtractor(max_length=200)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    made = {}
    for name, make in MAKE.items():
        made[name] = tmp_path_factory.mktemp(name)
        for part in make():
            part.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for number, seconds in enumerate((0.3, 1.0, 0.55)):
        (folder / f"{number}.wav").write_bytes(file_of(chirp(seconds, seed=number)))
    (folder / "9.wav").write_bytes(b"RIFF")
    return folder


@pytest.mark.parametrize("name", MAKE)
def test_rows_are_what_the_encoder_says_of_one_sound_at_a_time(
    name: str, folders: dict[str, Path], sounds: Path, tmp_path: Path
) -> None:
    encoder = load_encoder(folders[name])
    assert encoder.modality == "audio"
    for what in ("cls", "grid"):
        done = embed([sounds], folders[name], tmp_path / f"{what}.parquet", what=what, batch_size=4)
        assert (done.rows, done.unreadable) == (4, 1)
        rows = pq.read_table(tmp_path / f"{what}.parquet").to_pylist()
        assert "is not a sound that can be read" in rows[3]["error"]
        for row in rows[:3]:
            wanted = encoder.encode(encoder.prepare([encoder.bundle.open(row["path"])]))[what][0].numpy()
            found = np.array(row["embedding"], np.float32).reshape(-1, 16)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_encoder_of_transformers_has_the_weights_of_its_folder(folders: dict[str, Path]) -> None:
    for name, stock in (("whisper", WhisperModel), ("ast", ASTModel), ("wav2vec2", Wav2Vec2Model)):
        expected = stock.from_pretrained(folders[name])
        expected = getattr(expected, "encoder", expected) if name == "whisper" else expected
        found = load_encoder(folders[name]).model.state_dict()
        assert found.keys() == expected.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())


def test_sounds_are_not_read_at_a_part_of_their_size(folders: dict[str, Path], sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="Files of sounds are read whole; leave `scaled` out"):
        embed([sounds], folders["ours"], tmp_path / "out.parquet", decode="scaled")


@pytest.fixture(scope="module")
def composed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("composed")
    tokenizer = train_tokenizer(["what is heard", "a low tone"] * 4, 300, placeholders={})
    tokenizer.chat_template = None
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(root / "thinker")
    tokenizer.save_pretrained(root / "thinker")
    composition = compose(folders["whisper"], root / "thinker")  # the encoder tells its modality
    assert any("audio_projector is new: unshuffle_mlp, factor 2" in note for note in composition.notes)
    return composition.save(root / "mine")


@pytest.mark.new_chats
def test_a_model_that_hears_is_composed(composed: Path, folders: dict[str, Path]) -> None:
    model = OmniForConditionalGeneration.from_pretrained(composed)
    assert model.config.untrained == ["audio_projector"]
    encoder = load_encoder(folders["whisper"]).model.state_dict()
    assert all(torch.equal(model.model.audio_tower.state_dict()[name], value) for name, value in encoder.items())
    processor = OmniProcessor.from_pretrained(composed)
    chat = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "what"}]}]
    assert processor.apply_chat_template(chat, tokenize=False) == "User: <audio>what\n"


def test_exported_graphs_of_padded_sounds_say_what_the_encoder_says_of_each(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers", minversion="5.23")
    from omni.exchange.onnx import export

    made = export(folders["ours"], tmp_path / "out")
    assert [graph.file for graph in made.graphs] == ["audio_encoder.onnx"]
    assert made.graphs[0].inputs == {"audio_features": ["sounds", "length", 80], "audio_mask": ["sounds", "length"]}
    encoder = Encoder(OmniAudioModel.from_pretrained(folders["ours"]).eval(), OmniFeatureExtractor())
    waves = [chirp(0.4), chirp(0.9, seed=1), chirp(0.1, seed=2)]
    session = onnxruntime.InferenceSession(tmp_path / "out/audio_encoder.onnx")
    inputs = encoder.prepare(waves)
    cls, grid = session.run(["cls", "grid"], {key: value.numpy() for key, value in inputs.items()})
    for row, wave in enumerate(waves):
        alone = encoder.encode(encoder.prepare([wave]))
        np.testing.assert_allclose(cls[row], alone["cls"][0].numpy(), atol=1e-5)
        np.testing.assert_allclose(grid[row, : alone["grid"].shape[1]], alone["grid"][0].numpy(), atol=1e-5)

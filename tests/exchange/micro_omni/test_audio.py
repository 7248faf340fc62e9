"""The audio encoder of micro-Omni becomes omni's, says the same to the last bit, and goes back as it came."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM, AutoProcessor

import omni  # noqa: F401
from omni import OmniAudioConfig, OmniAudioModel, OmniFeatureExtractor
from omni.audio.sound import Sound
from omni.exchange.micro_omni import ConversionError, convert, to_micro_omni

CONFIG = {
    "mel_bins": 128, "sample_rate": 16000, "frame_hop": 160, "frame_win": 400, "downsample_time": 8, "d_model": 192,
    "n_layers": 4, "n_heads": 3, "d_ff": 768, "dropout": 0.1, "lr": 0.0003,
}  # fmt: skip


class AudioEncoder(nn.Module):
    """micro-Omni's audio encoder, from its facts alone: names and shapes of its tensors, and what stands where."""

    def __init__(self, reduction: int = 8, older: bool = False, layers: int = 4, d: int = 192, ff: int = 768) -> None:
        super().__init__()

        def halve(channels: int) -> nn.Conv2d:
            return nn.Conv2d(channels, 64, 3, 2, 1)

        down = nn.Module()
        down.net = nn.Sequential(halve(1), nn.GELU(), halve(64), nn.GELU())
        down.forward = down.net.forward
        self.down = nn.Sequential(down, halve(64), nn.GELU()) if reduction == 8 else down
        self.proj = nn.Linear(64 * 128 // reduction, d)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(layers))
        for block in self.blocks:
            block.norm1, block.norm2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
            block.qkv_proj, block.out_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
            if older:
                block.attn = nn.MultiheadAttention(d, 3, batch_first=True)
                del block.qkv_proj, block.out_proj
            block.mlp = nn.Sequential(nn.Linear(d, ff), nn.GELU(), nn.Linear(ff, d))
        self.norm = nn.RMSNorm(d, eps=1e-5)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """float[B, F, 128] -> float[B, N, D]."""
        x = self.down(mel[:, None])
        x = self.proj(x.permute(0, 2, 1, 3).flatten(2))
        for block in self.blocks:
            if hasattr(block, "attn"):
                qkv, out = (
                    F.linear(block.norm1(x), block.attn.in_proj_weight, block.attn.in_proj_bias),
                    block.attn.out_proj,
                )
            else:
                qkv, out = block.qkv_proj(block.norm1(x)), block.out_proj
            heads = qkv.unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
            x = x + out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return self.norm(x)


def write(folder: Path, config: dict[str, Any] | None = None, **shape: Any) -> tuple[AudioEncoder, Path]:
    """An encoder, and its audio_enc.pt as training leaves it."""
    torch.manual_seed(0)
    encoder = AudioEncoder(**shape).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    head = nn.Linear(192, 77).state_dict()
    torch.save({"enc": encoder.state_dict(), "head": head, "step": 3, "optimizer": {}}, folder / "audio_enc.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return encoder, folder / "audio_enc.pt"


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Equal bit for bit, and with the same names."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("reduction", [4, 8])
@pytest.mark.parametrize("older", [False, True])
@torch.no_grad()
def test_it_says_the_same_and_goes_back_as_it_came(reduction: int, older: bool, tmp_path: Path) -> None:
    theirs, file = write(tmp_path / "theirs", CONFIG | {"downsample_time": reduction}, reduction=reduction, older=older)
    done = convert([file], tmp_path / "ours")
    assert (done.model, done.kept, done.left) == ("OmniAudioModel", ["ctc_head"], ["step", "optimizer"])
    assert done.parameters == {"audio_encoder": sum(p.numel() for p in theirs.parameters())}
    if reduction == 8:
        assert done.parameters == {"audio_encoder": 2_049_408}  # as it is published
    ours = AutoModel.from_pretrained(tmp_path / "ours").double().eval()
    assert type(ours) is OmniAudioModel
    mel = torch.rand(2, 75, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9
    assert torch.equal(ours(mel).grid, theirs.double()(mel))
    back = to_micro_omni(tmp_path / "ours", tmp_path / "back")
    assert (back.parameters, back.kept) == (done.parameters, ["ctc_head"])
    before, after = (torch.load(path, weights_only=True) for path in (file, tmp_path / "back" / "audio_enc.pt"))
    assert same(after["enc"], before["enc"])
    assert same(after["head"], before["head"])
    kept = json.loads((tmp_path / "back" / "config.json").read_text())["audio"]
    assert kept == CONFIG | {"downsample_time": reduction}


def test_its_features_are_micro_omnis(tmp_path: Path) -> None:
    _, file = write(tmp_path / "theirs")
    done = convert([file], tmp_path / "ours")
    assert [note.partition(",")[0] for note in done.notes] == ["n_heads of the audio encoder is taken to be 3"]
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert type(extractor) is OmniFeatureExtractor
    found = {
        name: getattr(extractor, name) for name in ("n_fft", "win_length", "hop_length", "num_mel_bins", "mel_scale")
    }
    assert found == {"n_fft": 1024, "win_length": 400, "hop_length": 160, "num_mel_bins": 128, "mel_scale": "htk"}
    assert (extractor.log_mel, extractor.do_normalize) == (False, False)
    OmniFeatureExtractor(num_mel_bins=128).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match="has another n_fft, mel_scale, log_mel, do_normalize than micro-Omni"):
        to_micro_omni(tmp_path / "ours", tmp_path / "back")


def test_tensors_without_a_file_around_them(tmp_path: Path) -> None:
    encoder, _ = write(tmp_path, CONFIG)
    torch.save(encoder.state_dict(), tmp_path / "bare.pt")
    assert convert([tmp_path / "bare.pt"], tmp_path / "ours").model == "OmniAudioModel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.norm2.weight"), "missing: blocks.1.norm2.weight"),
        (lambda state: state.update({"extra.weight": torch.ones(2)}), "without a place: extra.weight"),
        (lambda state: state.pop("proj.weight"), "needs a tensor 'proj.weight'"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_tensors_that_are_no_audio_encoders(change: Any, message: str, tmp_path: Path) -> None:
    encoder, file = write(tmp_path)
    state = encoder.state_dict()
    change(state)
    torch.save({"enc": state}, file)
    with pytest.raises(ConversionError, match=message):
        convert([file], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_configuration_of_another_encoder(tmp_path: Path) -> None:
    _, file = write(tmp_path, CONFIG | {"n_layers": 5})
    with pytest.raises(ConversionError, match=r"n_layers 5 \(4\)"):
        convert([file], tmp_path / "ours")


def test_an_encoder_that_micro_omni_cannot_compute(tmp_path: Path) -> None:
    OmniAudioModel(OmniAudioConfig(num_hidden_layers=1)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match="stem 'conv1d' instead of 'conv2d', block_norm 'layer_norm' instead of"):
        to_micro_omni(tmp_path / "ours", tmp_path / "theirs")


# --- In a fused model -------------------------------------------------------------------------------------------------


@pytest.fixture
def hearing(make_micro_omni: Callable[..., Any], tmp_path: Path) -> tuple[Any, AudioEncoder, Path]:
    """A system that sees and hears, and its files."""
    system = make_micro_omni()
    system.proj_a = nn.Linear(192, 64)
    encoder, file = write(tmp_path / "theirs", reduction=8)
    system.write(file.parent)
    config = {"thinker": system.thinker_settings, "vision": system.vision, "audio": CONFIG}
    (file.parent / "config.json").write_text(json.dumps(config))
    return system, encoder, file.parent


@pytest.mark.new_chats
@torch.no_grad()
def test_a_model_that_sees_and_hears_says_what_micro_omni_says(hearing: tuple[Any, Any, Path], tmp_path: Path) -> None:
    system, encoder, theirs = hearing
    done = convert([theirs / "omni.pt"], tmp_path / "ours")  # the encoders lie beside it
    assert (done.kept, {*done.parameters}) == (
        ["ctc_head", "img_proj"],
        {"audio_encoder", "proj_a", "proj_v", "thinker", "vision_encoder"},
    )
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "ours").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    placeholders = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<audio>")]
    assert placeholders == [200, 201]  # no other id moved
    sound = Sound(np.random.default_rng(0).normal(0, 0.1, 9_000).astype(np.float32), 16_000)
    picture = Image.new("RGB", (40, 40), "red")
    content = [{"type": "image", "image": picture}, {"type": "audio", "audio": sound}, {"type": "text", "text": "what"}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = [1, *system.words.encode("what")]
    heard = system.proj_a(encoder(inputs["audio_features"]))
    assert inputs["input_ids"].tolist() == [[200, *[201] * heard.shape[1], *ids]]
    seen = system.proj_v(system.encoder(inputs["pixel_values"])[0])
    expected = system.thinker(torch.cat([seen, heard, system.thinker.tok_emb(torch.tensor([ids]))], 1))
    torch.testing.assert_close(model(**inputs).logits[..., :200], expected, rtol=1e-4, atol=1e-4)


def test_both_senses_go_back_as_they_came(hearing: tuple[Any, Any, Path], tmp_path: Path) -> None:
    system, encoder, theirs = hearing
    convert([theirs], tmp_path / "ours")
    to_micro_omni(tmp_path / "ours", tmp_path / "back")
    for name in ("omni.pt", "vision.pt", "audio_enc.pt"):
        before, after = (torch.load(folder / name, weights_only=True) for folder in (theirs, tmp_path / "back"))
        for part in after.keys() - {"config"}:
            assert same(after[part], before[part]), (name, part)
    assert json.loads((tmp_path / "back/config.json").read_text())["audio"] == CONFIG
    merged = system.merged() | {f"audio_encoder.{name}": value for name, value in encoder.state_dict().items()}
    save_file({name: value.clone() for name, value in merged.items()}, tmp_path / "omni.safetensors")
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((theirs / name).read_bytes())
    done = convert([tmp_path / "omni.safetensors"], tmp_path / "same")
    assert done.kept == ["talker"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "same"))
    assert same(first, second)
    to_micro_omni(tmp_path / "same", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), merged)


def test_a_model_that_only_hears_goes_back_too(hearing: tuple[Any, Any, Path], tmp_path: Path) -> None:
    system, _, theirs = hearing
    (theirs / "vision.pt").unlink()
    torch.save({"thinker": system.thinker.state_dict(), "proj_a": system.proj_a.state_dict()}, theirs / "omni.pt")
    done = convert([theirs], tmp_path / "ours")
    assert {*done.parameters} == {"audio_encoder", "proj_a", "thinker"}
    to_micro_omni(tmp_path / "ours", tmp_path / "back")
    parts = torch.load(tmp_path / "back/omni.pt", weights_only=True)
    assert same(parts["thinker"], system.thinker.state_dict())
    assert same(parts["proj_a"], system.proj_a.state_dict())

"""Sounds: files to embeddings, features to tokens, a training step, and the log-mel features themselves.

    whisper    transformers' WhisperEncoder of the same width, depth, heads and MLP, over the features of its own extractor.
               It hears windows of one length: 30 s as published, or here also just the longest sound of the race
    torch      omni's encoder from the parts of `torch.nn`, with the same weights; in eval mode its blocks use PyTorch's
               fused kernel. It takes omni's features, unpadded

Whisper makes a token of 20 ms, omni of 80 ms. `torch` computes the same as omni, so it is the peer of the same shape.
Files are WAV at 16 kHz, of 1 to 6 s, all different, and all read before they are measured. "omni" is the model itself,
"omni, packed" its form of `omni/fast`, "omni train" a step where speed was asked about it, as there.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from benchmarks import ceiling, peers
from benchmarks.embedding import by_engine, by_omni_embed
from benchmarks.machine import CPU
from benchmarks.measure import Call, Contestant, Race
from omni.audio.configuration_audio import OmniAudioConfig
from omni.audio.feature_extraction_audio import OmniFeatureExtractor
from omni.audio.modeling_audio import Conv1dStem, OmniAudioModel, sinusoids
from omni.fusion import acceleration

soundfile: Any = import_module("soundfile")  # it has no types

RATE = 16_000
BATCH = 16
SECONDS = 3.0
"""Of the sounds in a batch of one length."""
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.4}


def races(quick: bool) -> Iterator[Race]:
    """Files, features in both precisions, a training step, log-mel."""
    with TemporaryDirectory() as folder:
        yield _files(Path(folder), 4 if quick else 64)
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for dtype in (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,):
        torch.compiler.reset()
        yield _features(dtype, 4 if quick else BATCH, quick)
        torch.compiler.reset()
        yield _training(dtype, 4 if quick else BATCH, quick)
    yield _log_mel(4 if quick else BATCH)


def voice(number: int, seconds: float) -> np.ndarray:
    """Something like speech, float32[S]: a buzz whose pitch and loudness wander, and breath."""
    rng = np.random.default_rng(number)
    count = int(seconds * RATE)
    slow = np.interp(np.arange(count), np.linspace(0, count, 24), rng.uniform(0, 1, 24))
    buzz = np.sin(np.cumsum(2 * np.pi * (90 + 120 * slow) / RATE) * np.arange(1, 9)[:, None]).mean(0)
    return ((0.4 * buzz * slow) + rng.normal(0, 0.01, count)).astype(np.float32)


@torch.inference_mode(False)
def omni(dtype: torch.dtype = torch.float32, **options: Any) -> OmniAudioModel:
    """An encoder of the shape of `configs/audio_tiny.json`; the weights are the same every time."""
    torch.manual_seed(0)
    model = OmniAudioModel(OmniAudioConfig(hidden_dropout_prob=0.0, **options))
    return model.to(dtype).eval()


# --- Peers ------------------------------------------------------------------------------------------------------------


class TorchEncoder(nn.Module):
    """Convolutions, positions, CLS, `nn.TransformerEncoder`, RMSNorm."""

    def __init__(self, config: OmniAudioConfig) -> None:
        super().__init__()
        self.stem, width = Conv1dStem(config), config.hidden_size
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(
            width,
            config.num_attention_heads,
            config.intermediate_size,
            0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float[I, F, M] -> float[I, 1+N, D]."""
        hidden = self.stem(features, None)
        hidden = hidden + sinusoids(hidden.shape[1], hidden.shape[2], hidden.device).to(hidden.dtype)
        hidden = torch.cat([self.cls.expand(len(hidden), -1, -1), hidden], dim=1)
        found: torch.Tensor = self.norm(self.blocks(hidden))
        return found


def plain(model: OmniAudioModel) -> nn.Module:
    """`TorchEncoder` with the weights of `model`."""
    names = {"embeddings.stem.": "stem.", "embeddings.cls_token": "cls", **peers.BLOCKS}
    return peers.carry(model, TorchEncoder(model.config), names)


def whisper(seconds: float, dtype: torch.dtype = torch.float32) -> WhisperEncoder:
    """transformers' encoder of Whisper with windows of `seconds`; random weights."""
    config = OmniAudioConfig()
    made = WhisperConfig(
        num_mel_bins=config.num_mel_bins,
        d_model=config.hidden_size,
        encoder_layers=config.num_hidden_layers,
        encoder_attention_heads=config.num_attention_heads,
        encoder_ffn_dim=config.intermediate_size,
        max_source_positions=round(seconds * 50),
        attn_implementation="sdpa",
    )
    encoder: WhisperEncoder = WhisperEncoder(made).to(dtype).eval()
    return encoder


# --- Files ------------------------------------------------------------------------------------------------------------


def _files(folder: Path, count: int) -> Race:
    lengths = np.random.default_rng(0).uniform(1, 6, count)
    paths = [str(folder / f"{number}.wav") for number in range(count)]
    for number, path in enumerate(paths):
        soundfile.write(path, voice(number, lengths[number]), RATE)
    checkpoint = folder / "audio"
    omni().save_pretrained(checkpoint)
    OmniFeatureExtractor().save_pretrained(checkpoint)
    longest = float(np.ceil(lengths.max()))
    by_hand = _by_hand(paths)
    check = partial(_compare, by_hand(), TOLERANCE[torch.float32])
    theirs = {
        "transformers WhisperEncoder, windows of 30 s": partial(_whisper_files, 30.0, paths),
        f"transformers WhisperEncoder, windows of {longest:.0f} s": partial(_whisper_files, longest, paths),
    }
    ours: dict[str, Callable[[], Call]] = {
        "omni, feature extractor and model": lambda: by_hand,
        "omni engine, a batch at a time": partial(by_engine, checkpoint, paths, BATCH),
        "omni embed": partial(by_omni_embed, checkpoint, paths, BATCH),
    }
    contestants = [Contestant(name, build) for name, build in theirs.items()]
    contestants.append(Contestant("nn.TransformerEncoder, one by one", partial(_plain_files, paths), check=check))
    contestants += [Contestant(name, build, ours=True, check=check) for name, build in ours.items()]
    return Race(f"{count} WAV files of 1 to 6 s, float32", contestants, items=count, unit="file")


def _read(path: str) -> np.ndarray:
    samples: np.ndarray = soundfile.read(path, dtype="float32")[0]
    return samples


def _whisper_files(seconds: float, paths: Sequence[str]) -> Call:
    extract = WhisperFeatureExtractor(chunk_length=round(seconds))
    model = whisper(seconds)

    def embed() -> torch.Tensor:
        found = []
        for start in range(0, len(paths), BATCH):
            sounds = [_read(path) for path in paths[start : start + BATCH]]
            inputs = extract(sounds, sampling_rate=RATE, return_tensors="pt")
            found.append(model(inputs["input_features"]).last_hidden_state.mean(1))
        return torch.cat(found)

    return torch.inference_mode()(embed)


def _plain_files(paths: Sequence[str]) -> Call:
    extract, model = OmniFeatureExtractor(), plain(omni())

    def embed() -> torch.Tensor:
        sounds = (extract(_read(path), return_tensors="pt")["input_features"] for path in paths)
        return torch.cat([model(features)[:, 0] for features in sounds])

    return torch.inference_mode()(embed)


def _by_hand(paths: Sequence[str]) -> Call:
    extract, model = OmniFeatureExtractor(), omni()

    def embed() -> torch.Tensor:
        found = []
        for start in range(0, len(paths), BATCH):
            inputs = extract([_read(path) for path in paths[start : start + BATCH]], return_tensors="pt")
            found.append(model(**inputs).pooler_output)
        return torch.cat(found)

    return torch.inference_mode()(embed)


# --- Features ---------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)
def _batch(count: int) -> torch.Tensor:
    """float32[count, F, M]."""
    sounds = [voice(number, SECONDS)[:-1] for number in range(count)]  # so that the frames are even
    features: torch.Tensor = OmniFeatureExtractor()(sounds, return_tensors="pt")["input_features"]
    return features


def _features(dtype: torch.dtype, count: int, quick: bool) -> Race:
    features = _batch(count)
    with torch.inference_mode():
        expected = omni()(features).last_hidden_state
    check = partial(_compare, expected, TOLERANCE[dtype])
    given = features.to(dtype)
    contestants: list[Contestant] = []
    for way, prepare in peers.ways(quick).items():
        made: dict[str, Callable[[], Any]] = {
            "transformers WhisperEncoder": partial(_whisper_call, given, prepare),
            "nn.TransformerEncoder": partial(_call, lambda: plain(omni(dtype)), given, prepare),
            "omni": partial(_call, lambda: omni(dtype), given, prepare),
        }
        for name, build in made.items():
            same = name != "transformers WhisperEncoder"
            contestants.append(Contestant(f"{name}, {way}", build, ours=name == "omni", check=check if same else None))
    for name, cls_only in (("omni, packed", False), ("omni, packed, CLS alone", True)):
        of = partial(_compare, expected[:, :1] if cls_only else expected, TOLERANCE[dtype])
        contestants.append(
            Contestant(name, partial(_packed, dtype, features, cls_only), ours=True, check=of, whole=not cls_only)
        )
    contestants += ceiling.products(ceiling.audio(omni().config, features.shape[1]), count, dtype)
    name = str(dtype).removeprefix("torch.")
    return Race(f"features of {SECONDS:.0f} s, {name}, batch {count}", contestants, items=count, unit="sound")


def _call(make: Callable[[], nn.Module], features: torch.Tensor, prepare: Callable[[nn.Module], Any]) -> Call:
    module = prepare(make())
    return torch.inference_mode()(lambda: peers.tokens(module(features)))


def _packed(dtype: torch.dtype, features: torch.Tensor, cls_only: bool) -> Call:
    from omni.fast.packed_sounds import PackedAudioModel  # a room that can be deleted

    packed = PackedAudioModel(omni(), OmniFeatureExtractor(), dtype)
    sounds = [*features]
    return lambda: peers.tokens(packed(sounds, cls_only))


def _whisper_call(features: torch.Tensor, prepare: Callable[[nn.Module], Any]) -> Call:
    module, turned = prepare(whisper(SECONDS, features.dtype)), features.transpose(1, 2).contiguous()
    return torch.inference_mode()(lambda: peers.tokens(module(turned)))


# --- A training step --------------------------------------------------------------------------------------------------


def _training(dtype: torch.dtype, count: int, quick: bool) -> Race:
    features, bf16 = _batch(count), dtype == torch.bfloat16
    contestants = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = float(_loss(omni()(features).last_hidden_state))
    made: dict[str, Callable[[], nn.Module]] = {
        "transformers WhisperEncoder": lambda: whisper(SECONDS),
        "nn.TransformerEncoder": lambda: plain(omni()),
        "omni": omni,
        "omni train": omni,
    }
    for way, prepare in peers.ways(quick).items():
        for name, make in made.items():
            same = name != "transformers WhisperEncoder"
            given = features if same else features.transpose(1, 2).contiguous()
            contestants.append(
                Contestant(
                    f"{name}, {way}",
                    partial(_step, make, prepare, given, dtype, name == "omni train"),
                    ours=name.startswith("omni"),
                    check=partial(_same_loss, expected) if same else None,
                )
            )
    return Race(
        f"step, {'bf16 autocast' if bf16 else 'fp32'}, batch {count} of {SECONDS:.0f} s", contestants, count, "sound"
    )


def _step(
    make: Callable[[], nn.Module],
    prepare: Callable[[nn.Module], Any],
    features: torch.Tensor,
    dtype: torch.dtype,
    accelerated: bool,
) -> Call:
    model = make().train()
    module = prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    speed = acceleration.current() if accelerated else acceleration.Acceleration()

    def step() -> torch.Tensor:
        with speed.training(model, CPU, dtype):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = _loss(peers.tokens(module(features)))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def _loss(tokens: torch.Tensor) -> torch.Tensor:
    """The distance to fixed targets, another for each number."""
    return F.mse_loss(tokens.float(), torch.linspace(-1, 1, tokens.numel()).view_as(tokens).sin())


def _same_loss(expected: float, loss: torch.Tensor) -> float:
    if not (difference := abs(float(loss) - expected)) <= 1e-2 * expected:
        raise ValueError(f"its first loss is {float(loss):.4f} and not {expected:.4f}.")
    return difference


# --- Log-mel ----------------------------------------------------------------------------------------------------------


def _log_mel(count: int) -> Race:
    sounds = [voice(number, SECONDS) for number in range(count)]
    ours = OmniFeatureExtractor(do_normalize=False)
    expected = ours(sounds, return_tensors="np")["input_features"]
    filters = mel_filter_bank(257, 80, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    window = window_function(400, "hann")

    def by_transformers() -> np.ndarray:
        options = {"fft_length": 512, "power": 2.0, "mel_filters": filters, "log_mel": "log10", "mel_floor": 1e-10}
        return np.stack([spectrogram(sound, window, 400, 160, **options).T for sound in sounds])

    theirs = WhisperFeatureExtractor(chunk_length=round(SECONDS))
    contestants = [
        Contestant("transformers.audio_utils.spectrogram", lambda: by_transformers),
        Contestant("WhisperFeatureExtractor", lambda: lambda: theirs(sounds, sampling_rate=RATE, return_tensors="np")),
        Contestant(
            "omni",
            lambda: lambda: ours(sounds, return_tensors="np")["input_features"],
            ours=True,
            check=lambda found: float(np.abs(found - expected).max()),
        ),
    ]
    return Race(f"log-mel features of {SECONDS:.0f} s", contestants, items=count, unit="sound")


def _compare(expected: torch.Tensor, tolerance: float, found: torch.Tensor) -> float:
    difference = float((found.float() - expected).abs().max())
    if not difference <= tolerance:
        raise ValueError(f"its numbers are off by {difference:.2g}; rounding explains {tolerance:g}.")
    return difference

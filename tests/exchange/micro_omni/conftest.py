"""micro-Omni's modules, written anew from their description (the seed, and what is known of its files), and its files.

Nothing of omni is used here: what a converted checkpoint says is compared with what these modules say.
"""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

VISION = {"img_size": 32, "patch": 8, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "dropout": 0.1}
THINKER = {
    "vocab_size": 200,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 96,
    "rope_theta": 10000,
    "ctx_len": 256,
}
SENTENCES = [
    "The red circle is left of the blue square, and the small star is above it.",
    "A large green triangle stands at the bottom; how many objects are there?",
    "What color is the circle? Name the shape of the thing at the top right.",
    "Describe the image: two yellow moons on a dark background, 3 hearts, 17 rings.",
    "Vision encoders split pictures into patches, whose tokens see one another.",
]


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Encoder(nn.Module):
    """Convolution to patches, CLS in front, learned positions, PyTorch's own pre-norm blocks, RMSNorm."""

    def __init__(self, img_size: int, patch: int, d_model: int, n_layers: int, n_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.proj = nn.Conv2d(3, d_model, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, d_model))
        self.pos = nn.Parameter(torch.zeros(1, 1 + (img_size // patch) ** 2, d_model))
        block = {"batch_first": True, "norm_first": True, "activation": "gelu"}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, n_heads, d_ff, dropout, **block) for _ in range(n_layers)
        )
        self.norm = RMSNorm(d_model)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.proj(pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.repeat(len(patches), 1, 1), patches], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, :1], x[:, 1:]


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions: the first half of a head's width turns with the second."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, theta: float, grouped: bool, buffers: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.theta = heads, max(1, heads // 2) if grouped else heads, theta
        head = width // heads
        if grouped:
            self.q = nn.Linear(width, width, bias=False)
            self.k = nn.Linear(width, self.groups * head, bias=False)
            self.v = nn.Linear(width, self.groups * head, bias=False)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        if buffers:  # newer versions of micro-Omni save them
            self.rope_q = nn.Module()
            self.rope_q.register_buffer("inv_freq", theta ** (-torch.arange(0, head, 2) / head))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.q(x), self.k(x), self.v(x)) if hasattr(self, "q") else self.qkv(x).chunk(3, -1)
        q, k, v = (
            part.unflatten(-1, (count, -1)).transpose(1, 2)
            for part, count in ((q, self.heads), (k, self.groups), (v, self.groups))
        )
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, d_ff: int, **attention: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = Attention(width, **attention)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(width, d_ff, bias=False),
            "up_proj": nn.Linear(width, d_ff, bias=False),
            "down_proj": nn.Linear(d_ff, width, bias=False),
        })  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


class Thinker(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_ff: int,
        rope_theta: float,
        ctx_len: int,
        grouped: bool = True,
        buffers: bool = False,
    ) -> None:
        super().__init__()
        attention = {"heads": n_heads, "theta": float(rope_theta), "grouped": grouped, "buffers": buffers}
        self.tok_emb = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(Block(d_model, d_ff, **attention) for _ in range(n_layers))
        self.norm = RMSNorm(d_model)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            embeddings = block(embeddings)
        return self.lm_head(self.norm(embeddings))


def trained(module: nn.Module, seed: int) -> nn.Module:
    """As if trained: every tensor other than it was made, and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else parameter + noise * 0.1)
    return module.eval()


class MicroOmni:
    """A system of micro-Omni's: encoder, `proj_v`, Thinker, tokenizer; and the files that it leaves."""

    def __init__(self, tokenizer: bytes, vision: dict[str, Any] = VISION, **thinker: Any) -> None:
        settings = {**THINKER, **thinker}
        self.vision, self.thinker_settings = vision, {name: settings[name] for name in THINKER}
        self.encoder = trained(Encoder(**vision), 1)
        self.proj_v = trained(nn.Linear(vision["d_model"], settings["d_model"]), 2)
        self.proj_a = trained(nn.Linear(24, settings["d_model"]), 3)
        self.img_proj = trained(nn.Linear(vision["d_model"], 16), 4)
        self.thinker = trained(Thinker(**settings), 5)
        self.tokenizer = tokenizer
        self.words = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)

    def write(self, folder: Path, compiled: bool = False, config: bool = True) -> Path:
        """vision.pt, omni.pt, tokenizer.model and config.json, with what training leaves beside the weights."""

        def state(module: nn.Module) -> dict[str, torch.Tensor]:
            marked = {name.replace(".0.", ".0._orig_mod."): value for name, value in module.state_dict().items()}
            return marked if compiled else module.state_dict()

        folder.mkdir(parents=True, exist_ok=True)
        optimizer = torch.optim.AdamW(self.img_proj.parameters())
        self.img_proj(torch.ones(1, self.vision["d_model"])).sum().backward()
        optimizer.step()
        leftovers = {
            "optimizer": optimizer.state_dict(),
            "scheduler": {"last_epoch": 3, "lr_lambdas": [None]},
            "step": 7,
        }
        torch.save({"vit": state(self.encoder), "img_proj": state(self.img_proj), **leftovers}, folder / "vision.pt")
        parts = {"thinker": state(self.thinker), "proj_a": state(self.proj_a), "proj_v": state(self.proj_v)}
        torch.save({**parts, **leftovers}, folder / "omni.pt")
        (folder / "tokenizer.model").write_bytes(self.tokenizer)
        if config:
            (folder / "config.json").write_text(json.dumps({"thinker": self.thinker_settings, "vision": self.vision}))
        return folder

    def merged(self) -> dict[str, torch.Tensor]:
        """All parts as its export merges them."""
        parts = {"vision_encoder": self.encoder, "thinker": self.thinker, "proj_v": self.proj_v, "proj_a": self.proj_a}
        tensors = {
            f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
        }
        return tensors | {"talker.head.weight": torch.arange(6.0).reshape(2, 3)}

    def sequence(self, pictures: torch.Tensor, text: str) -> tuple[torch.Tensor, list[int]]:
        """[CLS of the picture, projected][begin of text][text], as embeddings, and the ids of the text."""
        ids = [1, *self.words.encode(text)]
        return torch.cat([self.proj_v(self.encoder(pictures)[0]), self.thinker.tok_emb(torch.tensor([ids]))], 1), ids

    def answer(self, pictures: torch.Tensor, question: str, length: int) -> str:
        """Greedy, and anew for every token."""
        sequence, _ = self.sequence(pictures, question)
        said: list[int] = []
        while len(said) < length and (not said or said[-1] != 2):
            said.append(int(self.thinker(sequence)[0, -1].argmax()))
            sequence = torch.cat([sequence, self.thinker.tok_emb(torch.tensor([[said[-1]]]))], 1)
        return str(self.words.decode(said)).strip()


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A SentencePiece BPE model with SentencePiece's defaults, which are micro-Omni's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        vocab_size=THINKER["vocab_size"],
        model_type="bpe",
        character_coverage=1.0,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def make_micro_omni(tokenizer_model: bytes) -> Callable[..., MicroOmni]:
    """`make_micro_omni(vision={...}, grouped=..., buffers=...)`."""

    def make(**options: Any) -> MicroOmni:
        return MicroOmni(tokenizer_model, **options)

    return make


@pytest.fixture(scope="session")
def micro_omni(make_micro_omni: Callable[..., MicroOmni]) -> MicroOmni:
    return make_micro_omni()

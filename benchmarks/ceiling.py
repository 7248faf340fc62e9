"""The ceiling: an encoder cannot be faster than its matrix products.

Shapes: B pictures or sounds, N patches, 1+N tokens, D width, F width of the MLP, h heads, d = D/h.

    patches   (B N, 3 P P) x (3 P P, D)            once; a sound has a convolution (B t, 3 C) x (3 C, D) for each halving
    qkv       (B (1+N), D) x (D, 3 D)              in each block, as are all that follow
    output    (B (1+N), D) x (D, D)
    scores    (1+N, d) x (d, 1+N)                  for each picture and head
    values    (1+N, 1+N) x (1+N, d)                for each picture and head
    fc1, fc2  (B (1+N), D) x (D, F), and back

Each is timed alone and repeatedly on the same operands, in every way that PyTorch offers; the fastest counts. An encoder's
share of the ceiling is below 1, because it also computes norms, softmax, GELU and residuals, and moves data around.

On a GPU it takes longer to write the scores of a batch to memory and read them again than to compute them, and a fused
kernel does neither. There both products of a head are one part, `attention`, with the softmax between them if that is
faster. With matrices this small the other products are bound by memory, too. `matmul_tflops` in the JSON document is what
the GPU reaches with large ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.machine import CPU
from benchmarks.measure import Call, Contestant, Part
from omni.audio.configuration_audio import OmniAudioConfig
from omni.vision.configuration_vision import OmniVisionConfig

New = Callable[..., torch.Tensor]
"""Makes an operand of the given sizes."""


@dataclass(frozen=True)
class Shape:
    """What an encoder's products follow from.

    Attributes:
        config: width, depth, heads and MLP.
        tokens: n, with CLS.
        stem: for each product of the stem its rows for one item, its depth, and its width.
    """

    config: OmniVisionConfig | OmniAudioConfig
    tokens: int
    stem: dict[str, tuple[int, int, int]]


def vision(config: OmniVisionConfig) -> Shape:
    """The shape of an encoder of pictures. With the defaults it has 0.428 GFLOP a picture."""
    depth = config.num_channels * config.patch_size**2
    return Shape(config, 1 + config.num_patches, {"patches": (config.num_patches, depth, config.hidden_size)})


def audio(config: OmniAudioConfig, frames: int) -> Shape:
    """The shape of an encoder of sounds of so many frames."""
    stem, before = {}, config.num_mel_bins
    for halving in range(1 + config.num_halvings):
        frames = frames if halving == 0 else -(-frames // 2)
        stem[f"convolution {halving}"] = (frames, 3 * before, config.hidden_size)
        before = config.hidden_size
    return Shape(config, 1 + frames, stem)


def products(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device = CPU) -> list[Contestant]:
    """Every product of an encoder of this shape, in every way."""
    config, tokens = shape.config, shape.tokens
    width, inner = config.hidden_size, config.intermediate_size
    rows, layers = batch * tokens, config.num_hidden_layers
    linear = {
        **{name: (1, batch * m, k, n) for name, (m, k, n) in shape.stem.items()},
        "qkv": (layers, rows, width, 3 * width),
        "output": (layers, rows, width, width),
        "fc1": (layers, rows, width, inner),
        "fc2": (layers, rows, inner, width),
    }
    heads, depth = batch * config.num_attention_heads, config.head_dim
    batched = {"scores": (layers, tokens, depth, tokens), "values": (layers, tokens, tokens, depth)}
    on_cpu, new = device.type == "cpu", partial(torch.randn, dtype=dtype, device=device)
    found = []
    for name, (times, m, k, n) in linear.items():
        part, ways = Part(name, times, 2 * m * k * n), LINEAR | (ON_CPU if on_cpu else {})
        found += [_contestant(part, way, make, (m, k, n), new) for way, make in ways.items()]
    for name, (times, m, k, n) in batched.items() if on_cpu else ():
        part = Part(name, times, 2 * heads * m * k * n)
        found += [_contestant(part, way, make, (heads, m, k, n), new) for way, make in BATCHED.items()]
    if not on_cpu:
        part = Part("attention", layers, 2 * 2 * heads * tokens * depth * tokens)
        sizes = batch, config.num_attention_heads, tokens, depth
        found += [_contestant(part, way, make, sizes, new) for way, make in ATTENTION.items()]
    return found


def _contestant(part: Part, way: str, make: Callable[..., Call], sizes: tuple[int, ...], new: New) -> Contestant:
    return Contestant(f"{part.name}, {way}", partial(make, *sizes, new), part=part)


def _linear(m: int, k: int, n: int, new: New) -> Call:
    x, weight = new(m, k), new(n, k)
    return torch.inference_mode()(lambda: F.linear(x, weight))


def _product(m: int, k: int, n: int, new: New) -> Call:
    x, weight, out = new(m, k), new(k, n), new(m, n)
    return torch.inference_mode()(lambda: torch.mm(x, weight, out=out))


def _packed(m: int, k: int, n: int, new: New) -> Call:
    """oneDNN with weights in the layout that it prefers, as Inductor does it for a frozen model."""
    x, weight = new(m, k), new(n, k)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, m)
    multiply = torch.ops.mkldnn._linear_pointwise
    return torch.inference_mode()(lambda: multiply(x, packed, None, "none", [], ""))


def _batched(b: int, m: int, k: int, n: int, new: New) -> Call:
    x, y, out = new(b, m, k), new(b, k, n), new(b, m, n)
    return torch.inference_mode()(lambda: torch.bmm(x, y, out=out))


def _transposed(b: int, m: int, k: int, n: int, new: New) -> Call:
    x, y, out = new(b, m, k), new(b, n, k), new(b, m, n)
    return torch.inference_mode()(lambda: torch.bmm(x, y.transpose(1, 2), out=out))


def _fused(b: int, h: int, n: int, d: int, new: New) -> Call:
    query, key, value = (new(b, h, n, d) for _ in range(3))
    return torch.inference_mode()(lambda: F.scaled_dot_product_attention(query, key, value))


def _both(b: int, h: int, n: int, d: int, new: New) -> Call:
    query, key, value = (new(b * h, n, d) for _ in range(3))
    return torch.inference_mode()(lambda: torch.bmm(torch.bmm(query, key.transpose(1, 2)), value))


LINEAR: dict[str, Callable[..., Call]] = {"F.linear": _linear, "mm": _product}
ON_CPU: dict[str, Callable[..., Call]] = {"packed oneDNN": _packed}
BATCHED: dict[str, Callable[..., Call]] = {"bmm": _batched, "bmm, transposed": _transposed}
ATTENTION: dict[str, Callable[..., Call]] = {"sdpa": _fused, "bmm twice": _both}

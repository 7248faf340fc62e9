"""The ceiling: an encoder cannot be faster than the matrix products that it consists of.

Shapes: B pictures, N patches, 1+N tokens, D width, F width of the MLP, h heads, d = D/h.

    patches   (B N, 3 P P) x (3 P P, D)            once
    qkv       (B (1+N), D) x (D, 3 D)              in each block, as all that follow
    output    (B (1+N), D) x (D, D)
    scores    (1+N, d) x (d, 1+N)                  for each picture and head
    values    (1+N, 1+N) x (1+N, d)                for each picture and head
    fc1, fc2  (B (1+N), D) x (D, F), and back

Each is timed alone, again and again on the same operands, in every way that PyTorch offers; the fastest counts. What an
encoder does besides (norms, softmax, GELU, residuals) and the memory between the products is what its share lacks.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.measure import Call, Contestant, Part
from omni.vision.configuration_vision import OmniVisionConfig


def products(config: OmniVisionConfig, batch: int, dtype: torch.dtype) -> list[Contestant]:
    """Every product of an encoder of this shape, in every way; together 0.428 GFLOP a picture for the defaults."""
    patches, width, inner = config.num_patches, config.hidden_size, config.intermediate_size
    rows, layers = batch * (1 + patches), config.num_hidden_layers
    linear = {
        "patches": (1, batch * patches, config.num_channels * config.patch_size**2, width),
        "qkv": (layers, rows, width, 3 * width),
        "output": (layers, rows, width, width),
        "fc1": (layers, rows, width, inner),
        "fc2": (layers, rows, inner, width),
    }
    heads, tokens, depth = batch * config.num_attention_heads, 1 + patches, config.head_dim
    batched = {"scores": (layers, tokens, depth, tokens), "values": (layers, tokens, tokens, depth)}
    found = []
    for name, (times, m, k, n) in linear.items():
        part = Part(name, times, 2 * m * k * n)
        found += [_contestant(part, way, make, (m, k, n), dtype) for way, make in LINEAR.items()]
    for name, (times, m, k, n) in batched.items():
        part = Part(name, times, 2 * heads * m * k * n)
        found += [_contestant(part, way, make, (heads, m, k, n), dtype) for way, make in BATCHED.items()]
    return found


def _contestant(
    part: Part, way: str, make: Callable[..., Call], sizes: tuple[int, ...], dtype: torch.dtype
) -> Contestant:
    return Contestant(f"{part.name}, {way}", partial(make, *sizes, dtype), part=part)


def _linear(m: int, k: int, n: int, dtype: torch.dtype) -> Call:
    x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    return torch.inference_mode()(lambda: F.linear(x, weight))


def _product(m: int, k: int, n: int, dtype: torch.dtype) -> Call:
    x, weight, out = (torch.randn(*size, dtype=dtype) for size in ((m, k), (k, n), (m, n)))
    return torch.inference_mode()(lambda: torch.mm(x, weight, out=out))


def _packed(m: int, k: int, n: int, dtype: torch.dtype) -> Call:
    """oneDNN on a layout of the weights that it chose itself; what Inductor does when it freezes a model."""
    x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, m)
    multiply = torch.ops.mkldnn._linear_pointwise
    return torch.inference_mode()(lambda: multiply(x, packed, None, "none", [], ""))


def _batched(b: int, m: int, k: int, n: int, dtype: torch.dtype) -> Call:
    x, y, out = (torch.randn(*size, dtype=dtype) for size in ((b, m, k), (b, k, n), (b, m, n)))
    return torch.inference_mode()(lambda: torch.bmm(x, y, out=out))


def _transposed(b: int, m: int, k: int, n: int, dtype: torch.dtype) -> Call:
    x, y, out = (torch.randn(*size, dtype=dtype) for size in ((b, m, k), (b, n, k), (b, m, n)))
    return torch.inference_mode()(lambda: torch.bmm(x, y.transpose(1, 2), out=out))


LINEAR = {"F.linear": _linear, "mm": _product, "packed oneDNN": _packed}
BATCHED = {"bmm": _batched, "bmm, transposed": _transposed}

"""The encoder, from prepared pictures to tokens: pictures a second in batches of 32 (1024 on a GPU), and the time of one.

Peers compute CLS and grid. omni also computes CLS alone, which is less work. Contestants that compute the same function are
compared with the shipped encoder in float32. The column "difference" is the largest difference of two numbers. A contestant
whose difference is larger than rounding explains does not run.

A GPU computes in bfloat16. For one picture, launching the kernels takes longer than running them. So a batch of one is
synchronised after each call, also measured as a CUDA graph, and has no ceiling.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks import ceiling, peers, pictures
from benchmarks.machine import CPU
from benchmarks.measure import Call, Contestant, Race
from omni.registry import get_modality
from omni.vision.image_processing_vision import OmniImageProcessor

Prepare = Callable[[nn.Module], Any]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.4}
"""Largest difference that rounding explains, among a million numbers of about 1, the largest 11."""


def races(quick: bool, device: torch.device = CPU) -> Iterator[Race]:
    """One race for each precision and batch size."""
    on_cpu = device.type == "cpu"
    for precision, dtype in PRECISIONS.items():
        if dtype == torch.float32 and not on_cpu:
            continue
        for batch in (4 if quick else 32 if on_cpu else 1024, 1):
            torch.compiler.reset()  # what an earlier race compiled counts against a limit
            pixels = pictures.batch(batch, device, dtype)
            ways = peers.ways(quick, graphs=not on_cpu and batch == 1)
            contestants = _peers(pixels, ways)
            contestants += _runtimes(batch, dtype, quick) if on_cpu else []
            contestants += _ours(pixels, ways)
            contestants += (
                ceiling.products(ceiling.vision(peers.omni().config), batch, dtype, device)
                if on_cpu or batch > 1
                else []
            )
            yield Race(f"{precision}, batch {batch}", contestants, items=batch, unit="img")


def _peers(pixels: torch.Tensor, ways: dict[str, Prepare]) -> list[Contestant]:
    check = partial(_check, len(pixels), TOLERANCE[pixels.dtype])

    def build(make: Callable[..., nn.Module], prepare: Prepare) -> Call:
        return _call(prepare(make(peers.omni(pixels.dtype, pixels.device))), pixels)

    return [
        Contestant(f"{name}, {way}", partial(build, make, prepare), check=check if make is peers.seed else None)
        for way, prepare in ways.items()
        for name, make in peers.ENCODERS.items()
    ]


def _runtimes(batch: int, dtype: torch.dtype, quick: bool) -> list[Contestant]:
    """omni's encoder in runtimes for deployment, without torch."""
    pixels, check = pictures.pixels(batch), partial(_check, batch, TOLERANCE[dtype])
    threads = torch.get_num_threads()
    made: dict[str, Callable[[], Any]] = {
        "omni exported, onnxruntime": partial(peers.onnxruntime, dtype),
        "omni exported, OpenVINO": partial(peers.openvino, dtype, 1),
    }
    if 1 < threads <= batch:
        made[f"omni exported, OpenVINO, {threads} requests"] = partial(peers.openvino, dtype, threads)
    if quick:
        made = dict.fromkeys(made, partial(peers.left_out, nn.Identity()))
    return [Contestant(name, partial(_run, make, pixels), ours=True, check=check) for name, make in made.items()]


def _run(make: Callable[[], Any], pixels: torch.Tensor) -> Call:
    encode = make()
    return lambda: encode(pixels)


def _ours(pixels: torch.Tensor, ways: dict[str, Prepare]) -> list[Contestant]:
    """omni's ways, by name. Those in `cls_only` compute only the CLS token."""
    dtype, check = pixels.dtype, partial(_check, len(pixels), TOLERANCE[pixels.dtype])
    whole: dict[str, Callable[[], Call]] = {}
    cls_only: dict[str, Callable[[], Call]] = {}
    on_cpu, pack = pixels.device.type == "cpu", get_modality("image").pack
    if on_cpu and pack:
        raw = pictures.raw(len(pixels))
        whole["omni packed"] = lambda: _call(_packed(dtype), pixels)
        whole["omni packed, from bytes"] = lambda: _call(_packed(dtype), raw)
        whole["omni packed, not compiled, from bytes"] = lambda: _call(_not_compiled(dtype), raw)
        cls_only["omni packed, CLS only"] = lambda: _call(_packed(dtype), pixels, cls_only=True)
    if on_cpu and pack and dtype != torch.float32:  # as an `Engine` computes where bfloat16 is no faster
        whole["omni packed, in float32, from bytes"] = lambda: _call(_packed(torch.float32), raw)
        cls_only["omni packed, in float32, CLS only"] = lambda: _call(_packed(torch.float32), raw, cls_only=True)
    for way, prepare in ways.items():
        whole[f"omni, {way}"] = partial(_model, prepare, pixels)
        if on_cpu:
            whole[f"omni, attention written out, {way}"] = partial(_model, prepare, pixels, "eager")
        cls_only[f"omni, CLS only, {way}"] = partial(_model, prepare, pixels, cls_only=True)
    return [Contestant(name, build, ours=True, check=check) for name, build in whole.items()] + [
        Contestant(name, build, ours=True, check=check, whole=False) for name, build in cls_only.items()
    ]


def _model(prepare: Prepare, pixels: torch.Tensor, attention: str = "sdpa", **options: Any) -> Call:
    return _call(prepare(peers.omni(pixels.dtype, pixels.device, attn_implementation=attention)), pixels, **options)


def _packed(dtype: torch.dtype) -> Any:
    """The packed form of the shipped encoder, for pixels that its image processor prepares."""
    pack = get_modality("image").pack
    assert pack is not None
    return pack(peers.omni(), OmniImageProcessor(), dtype)


def _not_compiled(dtype: torch.dtype) -> Any:
    """The packed form without compiled code, as on a machine without a C++ compiler."""
    with patch("omni.fast.packing.is_possible", return_value=False):
        return _packed(dtype)


def _call(encoder: Any, given: torch.Tensor, **options: Any) -> Call:
    """A call that returns the encoder's tokens. For one picture on a GPU it waits until they are computed."""
    alone = given.is_cuda and len(given) == 1

    @torch.inference_mode()
    def encode() -> torch.Tensor:
        found = peers.tokens(encoder(given, **options))
        if alone:
            torch.cuda.synchronize(given.device)
        return found

    for _ in range(2 if given.is_cuda else 0):  # a CUDA graph is recorded in the second call
        encode()
    return encode


def _check(batch: int, tolerance: float, found: torch.Tensor) -> float:
    """The largest difference of float[B, n, D] from the first n tokens of the shipped encoder in float32 on the CPU."""
    with torch.inference_mode():
        expected = peers.tokens(peers.omni()(pictures.pixels(min(batch, pictures.DRAWN))))
    repeated = found.cpu().float().reshape(-1, len(expected), *found.shape[1:])  # the same pictures again and again
    difference = float((repeated - expected[:, : found.shape[1]]).abs().max())
    if not difference <= tolerance:
        raise ValueError(f"its tokens are off by {difference:.2g}; rounding explains {tolerance:g}.")
    return difference

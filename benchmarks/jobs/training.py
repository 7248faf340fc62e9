"""A training step of the encoder: forward, in float32 or under bfloat16 autocast, backward, AdamW; pictures a second."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers, pictures
from benchmarks.measure import Call, Contestant, Race
from omni.vision.modeling_vision import OmniVisionModel

TOLERANCE = 1e-2


def races(quick: bool) -> Iterator[Race]:
    """A race in float32, and one in bfloat16 where the processor knows it; elsewhere a step would take half a minute.

    The encoder is the shipped one without dropout; the difference is that of the first step's loss to ours.
    """
    batch = 4 if quick else 64
    for bf16 in (False, True) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (False,):
        torch.compiler.reset()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            expected = _loss(peers.omni(), pictures.pixels(batch))
        check = partial(_check, float(expected))
        made: dict[str, Callable[[OmniVisionModel], nn.Module]] = {**peers.ENCODERS, "omni": lambda model: model}
        contestants = [
            Contestant(
                f"{name}, {way}",
                partial(_step, make, prepare, batch, bf16),
                ours=name == "omni",
                check=check if name == "omni" or make is peers.seed else None,
            )
            for way, prepare in peers.ways(quick).items()
            for name, make in made.items()
        ]
        contestants += [
            Contestant(
                f"omni, attention written out, {way}",
                partial(_step, made["omni"], prepare, batch, bf16, "eager"),
                ours=True,
                check=check,
            )
            for way, prepare in peers.ways(quick).items()
        ]
        yield Race(f"step, {'bf16 autocast' if bf16 else 'fp32'}, batch {batch}", contestants, items=batch, unit="img")


def _step(
    make: Callable[[OmniVisionModel], nn.Module],
    prepare: Callable[[nn.Module], Any],
    batch: int,
    bf16: bool,
    attention: str = "sdpa",
) -> Call:
    module = prepare(make(peers.omni(attn_implementation=attention).train()))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    pixels = pictures.pixels(batch)

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = _loss(module, pixels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _loss(module: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The distance to made-up tokens: every number of the output matters, and has a target of its own."""
    found = peers.tokens(module(pixels))
    target = torch.linspace(-1, 1, found.numel(), dtype=torch.float32).view_as(found).sin()
    return F.mse_loss(found.float(), target)


def _check(expected: float, loss: torch.Tensor) -> float:
    difference = abs(float(loss) - expected)
    if not difference <= TOLERANCE * expected:
        raise ValueError(f"its first loss is {float(loss):.4f} and not {expected:.4f}.")
    return difference

"""A training step of the encoder, in pictures a second: forward in float32 or under bfloat16 autocast, backward, AdamW."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers, pictures
from benchmarks.machine import CPU
from benchmarks.measure import Call, Contestant, Race
from omni.fusion import acceleration
from omni.vision.modeling_vision import OmniVisionModel

TOLERANCE = 1e-2


def races(quick: bool, device: torch.device = CPU) -> Iterator[Race]:
    """One race in float32, and one in bfloat16 if the processor has it; without it a step would take half a minute.

    The encoder is the shipped one, without dropout. "omni train" is a step where speed was asked about it, as there. The
    column "difference" compares the first step's loss with omni's. On a GPU there is only the race in bfloat16, and eager
    attention is not compiled.
    """
    on_cpu = device.type == "cpu"
    pixels = pictures.batch(4 if quick else 64 if on_cpu else 256, device)
    ways = peers.ways(quick)
    written_out = ways if on_cpu else {"eager": peers.eager}
    for bf16 in _precisions(on_cpu):
        torch.compiler.reset()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            expected = _loss(peers.omni(device=device), pixels)
        check = partial(_check, float(expected))
        made: dict[str, Callable[[OmniVisionModel], nn.Module]] = {**peers.ENCODERS, "omni": lambda model: model}
        contestants = [
            Contestant(
                f"{name}, {way}",
                partial(_step, make, prepare, pixels, bf16),
                ours=name == "omni",
                check=check if name == "omni" or make is peers.seed else None,
            )
            for way, prepare in ways.items()
            for name, make in made.items()
        ]
        contestants += [
            Contestant(
                f"omni, attention written out, {way}",
                partial(_step, made["omni"], prepare, pixels, bf16, "eager"),
                ours=True,
                check=check,
            )
            for way, prepare in written_out.items()
        ]
        if on_cpu:
            contestants += [
                Contestant(
                    f"omni train, {way}",
                    partial(_step, made["omni"], prepare, pixels, bf16, accelerated=True),
                    ours=True,
                    check=check,
                )
                for way, prepare in ways.items()
            ]
        title = f"step, {'bf16 autocast' if bf16 else 'fp32'}, batch {len(pixels)}"
        yield Race(title, contestants, items=len(pixels), unit="img")


def _precisions(on_cpu: bool) -> tuple[bool, ...]:
    """For each race, whether it is in bfloat16."""
    if not on_cpu:
        return (True,)
    return (False, True) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (False,)


def _step(
    make: Callable[[OmniVisionModel], nn.Module],
    prepare: Callable[[nn.Module], Any],
    pixels: torch.Tensor,
    bf16: bool,
    attention: str = "sdpa",
    accelerated: bool = False,
) -> Call:
    model = make(peers.omni(device=pixels.device, attn_implementation=attention).train())
    module = prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    speed = acceleration.current() if accelerated else acceleration.Acceleration()

    def step() -> torch.Tensor:
        with speed.training(model, pixels.device, torch.bfloat16 if bf16 else torch.float32):
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
                loss = _loss(module, pixels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def _loss(module: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The distance to fixed targets. Each number of the output has a target of its own, so each of them matters."""
    found = peers.tokens(module(pixels))
    target = torch.linspace(-1, 1, found.numel(), dtype=torch.float32, device=found.device).view_as(found).sin()
    return F.mse_loss(found.float(), target)


def _check(expected: float, loss: torch.Tensor) -> float:
    difference = abs(float(loss) - expected)
    if not difference <= TOLERANCE * expected:
        raise ValueError(f"its first loss is {float(loss):.4f} and not {expected:.4f}.")
    return difference

"""The cost of a picture with each kind of projector: over CLS, over the grid folded or not, over both.

Each contestant is `omni_tiny` (an encoder of 0.9M and a Thinker of 5.1M parameters) with another projector. The shipped one
counts as ours, the others as peers. docs/experiments.md tells how well each of them answers.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from benchmarks import peers, pictures
from benchmarks.measure import Call, Contestant, Race
from omni.data.collate import ConversationCollator
from omni.scenes.conversations import SceneConversations
from omni.session import Session
from omni.training.fused import build_omni

WAYS = {
    "CLS, linear": {"output": "cls", "projector": "linear", "factor": 1},
    "CLS, mlp": {"output": "cls", "projector": "mlp", "factor": 1},
    "grid, linear": {"output": "grid", "projector": "linear", "factor": 1},
    "grid, mlp": {"output": "grid", "projector": "mlp", "factor": 1},
    "grid, unshuffle_mlp 2 x 2": {"output": "grid", "projector": "unshuffle_mlp", "factor": 2},
    (SHIPPED := "CLS and grid, unshuffle_mlp 2 x 2"): {"output": "cls+grid", "projector": "unshuffle_mlp", "factor": 2},
}


def races(quick: bool) -> Iterator[Race]:
    """A first question about one picture, and a training step under bfloat16 autocast."""
    batch = 2 if quick else 16
    steps = f"training step, {batch} pictures with 8 questions each"
    yield Race("time to the first token", [Contestant(way, partial(_ask, way), way == SHIPPED) for way in WAYS])
    yield Race(steps, [Contestant(way, partial(_step, way, batch), way == SHIPPED) for way in WAYS], batch, "img")


@cache
def _built(way: str) -> tuple[Any, Any]:
    model, processor = build_omni(str(peers.CHECKPOINTS / "omni_tiny"), image=WAYS[way])
    return model, processor


def _ask(way: str) -> Call:
    model, processor = _built(way)
    model.eval()
    photo = pictures.photo(0, pictures.SIZES[0])
    return lambda: Session(model, processor, [photo]).ask("what color is the circle", 1)


def _step(way: str, batch: int) -> Call:
    model, processor = _built(way)
    model.train()
    scenes = SceneConversations("train", batch, 0, 8)
    inputs = ConversationCollator(processor)([scenes[number] for number in range(batch)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss: torch.Tensor = model(**inputs).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step

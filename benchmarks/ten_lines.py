"""A recipe against ten lines of torch, on pictures of your own and in equal CPU time.

    python -m benchmarks.ten_lines birds/train birds/test --epochs 7

`omni train configs/train_classes.json` runs first, in one thread. All of its CPU time counts: imports, reading pictures,
evaluations. Then the ten lines train the same encoder with a linear head for as many CPU seconds (AdamW, learning rate
1e-3, batches of 64, float32, no augmentation). Of theirs only the steps count: pictures are decoded before.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ENCODER = "checkpoints/vision_world"
RECIPE = "configs/train_classes.json"


def ten_lines(train: str, test: str, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Fine-tune the encoder with plain torch for so many CPU seconds, and return its score on the held-out pictures."""
    import torch
    from torch import nn

    from omni import OmniImageProcessor, OmniVisionModel
    from omni.data.manifests import Manifest
    from omni.training.classification import ManifestClasses

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    processor = OmniImageProcessor.from_pretrained(ENCODER)
    sets = {name: ManifestClasses(Manifest.read(path), "image") for name, path in (("train", train), ("test", test))}
    names = sorted({sets["train"].label(index) for index in range(len(sets["train"]))})

    def load(rows: ManifestClasses) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = [processor(rows[index][0], return_tensors="pt")["pixel_values"].half() for index in range(len(rows))]
        return torch.cat(pixels), torch.tensor([names.index(rows.label(index)) for index in range(len(rows))])

    (pictures, labels), (held_out, answers) = load(sets["train"]), load(sets["test"])

    # The ten lines.
    encoder = OmniVisionModel.from_pretrained(ENCODER)
    head = nn.Linear(encoder.config.hidden_size, len(names))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    encoder.train()
    start, steps = time.process_time(), 0
    while time.process_time() - start < seconds:
        for batch in torch.split(torch.randperm(len(labels)), 64):
            loss = nn.functional.cross_entropy(head(encoder(pictures[batch].float()).cls[:, 0]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            steps += 1
            if time.process_time() - start >= seconds:
                break

    encoder.eval()
    with torch.inference_mode():
        logits = torch.cat([head(encoder(part.float()).cls[:, 0]) for part in torch.split(held_out, 64)])
    right = int((logits.argmax(-1) == answers).sum())
    return {"accuracy": right / len(answers), "n": len(answers), "steps": steps, "epochs": steps * 64 / len(labels)}


def recipe(train: str, test: str, output: str, epochs: float, settings: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Train by the recipe. Returns the result of `omni evaluate`, and the CPU seconds of the training."""
    own = [f"train.path={train}", f"evaluate.path={test}", f"output={output}", f"arguments.num_train_epochs={epochs:g}"]
    options = [word for each in (*own, *settings) for word in ("--set", each)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = _children()
    subprocess.run([sys.executable, "-m", "omni", "train", RECIPE, *options], check=True, env=environment)
    seconds = _children() - before
    evaluate = [sys.executable, "-m", "omni", "evaluate", output, "--data", test, "--json"]
    document = subprocess.run(evaluate, check=True, env=environment, capture_output=True, text=True).stdout
    (score,) = json.loads(document)["scores"]
    return score, seconds


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(
    train: str,
    test: str,
    epochs: Annotated[float, typer.Option(help="Epochs of the recipe.")] = 15,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As of omni train.")] = None,
) -> None:
    """Train both in equal CPU time, and print both scores on the held-out pictures TEST."""
    with tempfile.TemporaryDirectory() as folder:
        score, seconds = recipe(train, test, str(Path(folder) / "classes"), epochs, settings or [])
    lines = ten_lines(train, test, seconds)
    typer.echo(f"best constant answer      {score['constant']:.3f}   n = {score['n']:,}")
    typer.echo(
        f"ten lines of torch        {lines['accuracy']:.3f}   {lines['epochs']:.1f} epochs in {seconds:.0f} CPU s"
    )
    typer.echo(f"omni train {Path(RECIPE).name}  {score['accuracy']:.3f}   {epochs:g} epochs in {seconds:.0f} CPU s")


if __name__ == "__main__":
    typer.run(main)

"""Picture files to CLS embeddings, float[n, D]: reading, decoding, resizing and encoding, as somebody with a folder does.

    transformers    `pipeline("image-feature-extraction")` on a ViT of the same shape, with its own image processor
    timm, torch     an encoder in float32 behind a DataLoader whose workers decode, resize and normalise

Batch sizes and numbers of workers are all tried; the best is what ours are compared with. Files are made on the fly and
different from each other; all have been read before they are measured, so that no disk is.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import pipeline

from benchmarks import peers, pictures
from benchmarks.embedding import by_engine, by_omni_embed
from benchmarks.measure import Call, Contestant, Race
from omni.vision.image_processing_vision import OmniImageProcessor
from omni.vision.modeling_vision import OmniVisionModel
from omni.vision.pictures import read_picture

VISION = peers.CHECKPOINTS / "vision_tiny"
BATCH = 32
WORKERS = (0, 1, 2, 4)
TOLERANCE = {"float32": 0.05, "bfloat16": 0.3, "scaled": 3.0}
"""Two ways of resizing round differently, to one of 255 levels; bfloat16 has eight bits; a JPEG that was decoded at half
its size is another picture, if only a little."""


def races(quick: bool) -> Iterator[Race]:
    """For each size of pictures one race beside either peer."""
    for size, count in zip(pictures.SIZES, (4, 4) if quick else (128, 64), strict=True):
        with TemporaryDirectory() as folder:
            paths = pictures.write_photos(Path(folder), count, size)
            check = partial(_check, _by_hand(paths)())
            ours = _ours(paths, check)
            title = f"{count} JPEG files of {size[0]}x{size[1]}, beside"
            pipelines = [
                Contestant(
                    f"transformers pipeline, batch {batch}, {workers} workers",
                    partial(_pipeline, Path(folder) / "vit", paths, batch, workers),
                )
                for batch, workers in ((1, 0), (8, 0), (32, 0), (32, 2))
            ]
            yield Race(f"{title} a pipeline of transformers", [*pipelines, *ours], items=count, unit="file")
            loaders = [
                Contestant(
                    f"{name} behind a DataLoader, {workers} workers",
                    partial(_loader, make, paths, workers),
                    check=partial(check, "float32") if make is peers.seed else None,
                )
                for name, make in {"timm": peers.timm, "nn.TransformerEncoder": peers.seed}.items()
                for workers in WORKERS
            ]
            yield Race(f"{title} an encoder behind a DataLoader", [*loaders, *ours], items=count, unit="file")


# --- ours -------------------------------------------------------------------------------------------------------------


def _ours(paths: Sequence[str], check: Callable[[str, torch.Tensor], float]) -> list[Contestant]:
    """Every way of ours, by its name and the precision of its arithmetic."""
    builds: dict[tuple[str, str], Callable[[], Call]] = {
        ("omni, image processor and model", "float32"): partial(_by_hand, paths),
        ("omni engine, one thread", "float32"): partial(by_engine, VISION, paths, BATCH, "float32"),
        ("omni engine, one thread", "bfloat16"): partial(by_engine, VISION, paths, BATCH, "bfloat16"),
        ("omni embed", "float32"): partial(by_omni_embed, VISION, paths, BATCH, "float32", "exact"),
        ("omni embed", "bfloat16"): partial(by_omni_embed, VISION, paths, BATCH, "bfloat16", "exact"),
        ("omni embed --decode scaled", "float32"): partial(by_omni_embed, VISION, paths, BATCH, "float32", "scaled"),
        ("omni embed --decode scaled", "bfloat16"): partial(by_omni_embed, VISION, paths, BATCH, "bfloat16", "scaled"),
    }
    return [
        Contestant(
            f"{name}, {precision}", build, ours=True, check=partial(check, "scaled" if "scaled" in name else precision)
        )
        for (name, precision), build in builds.items()
    ]


def _by_hand(paths: Sequence[str]) -> Call:
    """The two objects that a checkpoint has, one batch after the other."""
    processor, model = OmniImageProcessor(), peers.omni()

    def embed() -> torch.Tensor:
        found = []
        for start in range(0, len(paths), BATCH):
            read = [read_picture(path) for path in paths[start : start + BATCH]]
            found.append(model(processor(read, return_tensors="pt")["pixel_values"], cls_only=True).pooler_output)
        return torch.cat(found)

    return torch.inference_mode()(embed)


def _check(expected: torch.Tensor, precision: str, found: torch.Tensor) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"it made {tuple(found.shape)} of numbers, expected {tuple(expected.shape)}.")
    difference = float((found.float() - expected).abs().max())
    if not difference <= TOLERANCE[precision]:
        raise ValueError(f"its embeddings are off by {difference:.2g}; rounding explains {TOLERANCE[precision]:g}.")
    return difference


# --- transformers -----------------------------------------------------------------------------------------------------


def _pipeline(folder: Path, paths: Sequence[str], batch: int, workers: int) -> Call:
    if not folder.exists():
        peers.vit(peers.omni()).save_pretrained(folder)  # type: ignore[operator]
        settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    extract = pipeline("image-feature-extraction", model=str(folder), device="cpu")

    def embed() -> torch.Tensor:
        # tensors: as lists of numbers, which is the default, they would take twice as long
        found = extract(list(paths), batch_size=batch, num_workers=workers, return_tensors=True)
        return torch.stack([tokens[0, 0] if tokens.ndim == 3 else tokens[0] for tokens in found])

    return embed


# --- a DataLoader -----------------------------------------------------------------------------------------------------


class PictureFiles(Dataset[torch.Tensor]):
    """Files as an encoder takes them, float[3, 224, 224]."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as file:
            picture = file.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return values.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def _loader(make: Callable[[OmniVisionModel], nn.Module], paths: Sequence[str], workers: int) -> Call:
    model = make(peers.omni())
    # the measurement shows which number is best
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    # they stay between rounds: starting them is not counted
    loader = DataLoader(PictureFiles(paths), batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)

    def embed() -> torch.Tensor:
        return torch.cat([peers.tokens(model(pixels))[:, 0] for pixels in loader])

    return torch.inference_mode()(embed)

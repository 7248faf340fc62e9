"""Supervised pretraining of an encoder: it labels every patch of a scene with the object that covers it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel

from omni.data.collate import IGNORED
from omni.training.encoder import build_encoder
from omni.training.pixels import AS_BYTES, Normalization
from omni.training.recipe import Recipe
from omni.training.sections import EncoderSection

from . import glyphs
from .drawing import render_with_map
from .recipe import Scenes
from .scene import Scene, sample_scene, stream
from .vocabulary import BACKGROUNDS, COLORS, HELD_OUT_PAIRS, PATTERNS, PLACES, SHAPES, SIZES

CHARACTERS = tuple(str(n) for n in range(glyphs.CHARACTERS))
PATCH_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": COLORS,
    "size": SIZES,
    "pattern": PATTERNS,
    "place": PLACES,
    "character": CHARACTERS,
}
SCENE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "background": BACKGROUNDS,
    "dark": ("light", "dark"),
    "count": tuple(str(n) for n in range(1, 10)),
    "character": CHARACTERS,
}
ATTRIBUTES = (*(f"patch_{name}" if name in SCENE_ATTRIBUTES else name for name in PATCH_ATTRIBUTES), *SCENE_ATTRIBUTES)
NOTHING = len(SHAPES)  # the "shape" of a patch without an object
LOSS_WEIGHTS = {"shape": 4.0, "patch_character": 2.0, "character": 2.0}
"""Shapes and characters are the slowest to learn, so they get more of the gradient."""


class DenseModel(nn.Module):
    """An encoder with classification heads, which training uses and `save` leaves out.

    Each patch names the shape, colour, size, pattern and place of the object on it, or that there is none. The CLS token
    names the kind and the brightness of the background and the number of objects. Where a picture shows a character
    instead of a scene, patches and CLS name the character. The heads are linear.

    Two rules keep the loss from teaching something false. First, every object has the same weight, however many patches
    it covers. Second, a colour does not count against a shape that training never shows in it. For this, logits are
    adjusted by the log-frequencies of the training pairs (Menon et al. 2021, "Long-tail learning via logit adjustment").
    That takes the held-out pairs out of the softmax, where the plain loss would learn "cyan, so no hexagon".
    """

    def __init__(self, encoder: PreTrainedModel, image_processor: BaseImageProcessor) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalization = Normalization(image_processor)
        for name, table in zip(("shape_shift", "color_shift"), _pair_shifts(), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.loss_weights = [LOSS_WEIGHTS.get(name, 1.0) for name in ATTRIBUTES]
        width = encoder.config.hidden_size
        self.patch_sizes = [len(values) + (name == "shape") for name, values in PATCH_ATTRIBUTES.items()]  # + "nothing"
        self.scene_sizes = [len(values) for values in SCENE_ATTRIBUTES.values()]
        self.heads = nn.ModuleDict(
            {"patch": nn.Linear(width, sum(self.patch_sizes)), "scene": nn.Linear(width, sum(self.scene_sizes))}
        )

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        patch_weights: torch.Tensor,
        scene_labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Args: pixel_values uint8[B, 3, H, W], labels int64[B, 6, N], patch_weights float[B, N], scene_labels int64[B, 4].

        Returns `loss`, and `scores` float[B, 10, 2]: for each picture and attribute, the right labels and all labels.
        """
        encoded = self.encoder(self.normalization(pixel_values))
        # by name, not by index: accelerate may replace the dictionary with a compiled module, which has no index
        patch, scene = self.heads.get_submodule("patch"), self.heads.get_submodule("scene")
        shape, color, *others = patch(encoded.grid).float().split(self.patch_sizes, dim=-1)
        scene_logits = scene(encoded.cls).float().split(self.scene_sizes, dim=-1)
        if self.training:
            assert isinstance(self.shape_shift, torch.Tensor)
            assert isinstance(self.color_shift, torch.Tensor)
            shape = shape + self.shape_shift[labels[:, 1].where(labels[:, 1] != IGNORED, -1)]  # -1: no named colour
            color = color + self.color_shift[labels[:, 0].where(labels[:, 0] != IGNORED, NOTHING)]
        losses, scores = [], []
        answers = [*labels.unbind(1), *(answer[:, None] for answer in scene_labels.unbind(1))]
        for logits, answer in zip((shape, color, *others, *scene_logits), answers, strict=True):
            weights = patch_weights if answer.shape == patch_weights.shape else torch.ones_like(answer)
            loss = F.cross_entropy(rearrange(logits, "b n k -> b k n"), answer, ignore_index=IGNORED, reduction="none")
            losses.append((loss * weights).sum() / (weights * (answer != IGNORED)).sum().clamp_min(1e-6))
            asked = answer != IGNORED
            if logits is shape:
                asked &= answer != NOTHING
            right = (logits.argmax(-1) == answer) & asked
            scores.append(torch.stack([right.sum(1), asked.sum(1)], dim=-1))
        total = torch.stack([weight * loss for weight, loss in zip(self.loss_weights, losses, strict=True)]).sum()
        return {"loss": total / sum(self.loss_weights), "scores": torch.stack(scores, dim=1).float()}


def _pair_shifts() -> tuple[torch.Tensor, torch.Tensor]:
    """Shifts of the shape logits for each colour, float[11, 11], and of the colour logits for each shape, float[11, 10].

    The last row is for patches without a named colour, or without a shape.
    """
    shapes, colors = len(SHAPES), len(COLORS)
    shape_shift, color_shift = torch.zeros(colors + 1, shapes + 1), torch.zeros(shapes + 1, colors)
    for shape, color in HELD_OUT_PAIRS:
        row, column = COLORS.index(color), SHAPES.index(shape)
        shape_shift[row, column] = color_shift[column, row] = -torch.inf
    return shape_shift, color_shift


class DenseScenes(torch.utils.data.Dataset[dict[str, Any]]):
    """Scenes with the labels of their patches; a share `characters` of the pictures are characters. Drawn on access."""

    def __init__(
        self,
        split: str,
        length: int,
        image_processor: BaseImageProcessor,
        first: int = 0,
        characters: float = 0.0,
        **scene_options: Any,
    ) -> None:
        self.split, self.length, self.first, self.characters = split, length, first, characters
        self.image_processor, self.scene_options = image_processor, scene_options

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = self.first + index
        rng = stream("picture", self.split, seed)
        if rng.random() < self.characters:
            return self._character(rng.randrange(glyphs.CHARACTERS), seed)
        scene = sample_scene(seed, self.split, **self.scene_options)
        picture, owner = render_with_map(scene)
        return {
            "pixel_values": self._pixels(picture),
            "labels": patch_labels(scene, owner),
            "patch_weights": patch_weights(owner),
            "scene_labels": scene_labels(scene),
        }

    def _character(self, character: int, seed: int) -> dict[str, Any]:
        picture, inked = glyphs.write_with_map(character, seed, self.split)
        covered = torch.from_numpy(inked.ravel())
        labels = torch.full((len(PATCH_ATTRIBUTES), covered.numel()), IGNORED)
        labels[-1, covered] = character
        return {
            "pixel_values": self._pixels(picture),
            "labels": labels,
            "patch_weights": covered / covered.sum().clamp_min(1),
            "scene_labels": torch.tensor([IGNORED, IGNORED, IGNORED, character]),
        }

    def _pixels(self, picture: Image.Image) -> torch.Tensor:
        pixels: torch.Tensor = self.image_processor(picture, **AS_BYTES, return_tensors="pt")["pixel_values"][0]
        return pixels


def patch_labels(scene: Scene, owner: np.ndarray) -> torch.Tensor:
    """Labels int64[6, N] from the index of the object on each patch, int64[14, 14] (-1: none)."""
    table = np.full(
        (len(PATCH_ATTRIBUTES), len(scene.objects) + 1), IGNORED
    )  # the last column is for patches without an object
    for i, thing in enumerate(scene.objects):
        for row, (name, values) in enumerate(PATCH_ATTRIBUTES.items()):
            value = PLACES[thing.place] if name == "place" else getattr(thing, name, None)
            if value in values:  # a neutral colour has no name
                table[row, i] = values.index(value)
    table[0, -1] = NOTHING
    return torch.from_numpy(table[:, owner.ravel()])


def patch_weights(owner: np.ndarray) -> torch.Tensor:
    """Weights float[N] that sum to one over the patches of each object, and over the patches without one."""
    _, which, patches = np.unique(owner, return_inverse=True, return_counts=True)
    return torch.from_numpy((1 / patches)[which.ravel()]).float()


def scene_labels(scene: Scene) -> torch.Tensor:
    """Labels int64[4]: background, dark, count, and an ignored one for the character."""
    return torch.tensor([BACKGROUNDS.index(scene.background), int(scene.dark), len(scene.objects) - 1, IGNORED])


class DensePretraining:
    """The objective "dense": supervised pretraining of an encoder on scenes. It saves the encoder without the heads."""

    collate = None

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.model, EncoderSection)
        encoder, self.processor = build_encoder(recipe.model)
        self.model = DenseModel(encoder, self.processor)
        self.train, self.evaluate = self._data(recipe.train), self._data(recipe.evaluate)

    def _data(self, data: Any) -> DenseScenes | None:
        if data is None:
            return None
        assert isinstance(data, Scenes)
        return DenseScenes(data.split, data.count, self.processor, data.first, data.characters, **data.scene_options())

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """`scores` float[B, 10, 2], unchanged, as they are small."""
        return logits

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy of each attribute that has labels, over patches or pictures."""
        right, asked = np.asarray(prediction.predictions).sum(0).T
        return {name: float(r / n) for name, r, n in zip(ATTRIBUTES, right, asked, strict=True) if n}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the encoder and its image processor."""
        assert isinstance(model, DenseModel)
        model.encoder.save_pretrained(folder)
        self.processor.save_pretrained(folder)

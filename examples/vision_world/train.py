"""Train `checkpoints/vision_world`, on from its own weights, on the pictures that pictures.py made.

    OMP_NUM_THREADS=1 python examples/vision_world/train.py runs/world runs/vision_world 50

The last argument is the time in minutes of the processor; the learning rate falls to nothing at its end. What has been
learnt is saved every few minutes, and the same command goes on from there. Each step shows one batch:

* an emoji, as two vendors draw it, has the same label, category and sort (softmax over cosines to one learned vector each);
* of all views in the batch, the other view of a picture is nearest (InfoNCE): an emoji of two vendors, a word in two
  fonts, and an icon or a photograph that is cut, turned, tinted, reduced and compressed in two ways;
* of all pictures of the batch and of the last steps, the copy of a picture is nearest: as a JPEG file, cut or reduced. They
  are emoji of one sort, each of two vendors, icons, photographs and scenes;
* a character, in any font or as a scan of handwriting, often of 8 x 8 pixels, has a label of its own;
* the patches of a printed word name the letter that they show;
* scenes keep the tokens of `vision_tiny`, CLS and grid (distillation).

Most pictures are small, and of the views the encoder sees only a random third of the patches for most of the time (FLIP, Li
et al. 2022).
"""

import io
import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pictures import FONTS
from PIL import Image
from torch import nn
from words import LETTERS, MOST, choose, drawn, english, fonts_in

from omni import OmniImageProcessor, OmniVisionModel
from omni.scenes.dense import DenseScenes
from omni.training.optimizer import Muon

START, TEACHER = "checkpoints/vision_world", "checkpoints/vision_tiny"
IDS, ICONS, CHARACTERS, WORDS, PHOTOS = 60, 10, 24, 4, 6
"""What a step shows: two views each of emoji, icons, words and photographs; single characters."""
COPIED, SCENES, SPELLED = (6, 2, 2, 8), 14, 40
"""Emoji, icons, photographs and scenes beside their copies; scenes whose tokens are kept; printed words."""
SHOWN = 1400
"""Characters by whose means their vectors begin."""
REMEMBERED = 4096
"""CLS vectors of the last steps, which the copy of a picture is told from."""
RATE, WARMUP = 0.002, 30
SEEN, WHOLE_FROM = 64, 0.62
"""Patches of a view that are seen, and the share of the time after which all are."""
SIDE = 70
"""Side of the views. The encoder's 224 pixels are these, enlarged by 3.2: 5 of them are a patch."""
STORED = 4400
"""Scenes that are drawn before training, with the tokens to keep."""
SAVED = 240
"""Seconds after which what has been learnt is saved."""
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


# --- Views ------------------------------------------------------------------------------------------------------------


def uniform(n: int, low: float, high: float) -> torch.Tensor:
    """float[n]."""
    return torch.empty(n).uniform_(low, high)


def views(
    pictures: np.ndarray, photos: np.ndarray, turn: float = 12.0, tint: float = 1.0, mirrored: Any = 1.0
) -> torch.Tensor:
    """Pictures uint8[n, 72, 72, 4], moved and turned over a background: float[n, 3, 70, 70], 0 to 255."""
    n = len(pictures)
    rgba = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    opaque = rgba[:, 3:] / 255
    rgba = torch.cat([rgba[:, :3] * opaque, rgba[:, 3:]], 1)
    angle, zoom, stretch, shift = (
        uniform(n, -turn, turn).deg2rad(),
        uniform(n, 0.72, 1.12),
        uniform(n, -0.12, 0.12).exp(),
        0.1,
    )
    across, down = (
        torch.stack([mirrored * stretch / zoom * angle.cos(), uniform(n, -0.08, 0.08) - angle.sin() / zoom], 1),
        torch.stack([angle.sin() / zoom, angle.cos() / zoom / stretch], 1),
    )
    moved = torch.stack([torch.cat([row, uniform(n, -shift, shift)[:, None]], 1) for row in (across, down)], 1)
    moved[torch.rand(n) < 0.25] = torch.eye(2, 3)
    rgba = F.grid_sample(rgba, F.affine_grid(moved, [n, 4, SIDE, SIDE], align_corners=False), align_corners=False)
    ground, kind = (torch.rand(n, 3, 1, 1) * 255).expand(n, 3, SIDE, SIDE).clone(), torch.rand(n)
    ground[kind < 0.45], ground[(kind >= 0.45) & (kind < 0.53)] = 255.0, 0.0
    ramp = torch.linspace(0, 1, SIDE)
    for i in torch.where(kind > 0.85)[0].tolist():
        if kind[i] < 0.93:
            ground[i] = (torch.rand(3, 1, 1) * (1 - ramp) + torch.rand(3, 1, 1) * ramp) * 255
        else:
            ground[i] = torch.from_numpy(photos[np.random.randint(len(photos)), 20:90, 20:90].copy()).permute(2, 0, 1)
    return spoiled(rgba[:, :3] + ground * (1 - rgba[:, 3:] / 255), tint)


def spoiled(pictures: torch.Tensor, tint: float) -> torch.Tensor:
    """Pictures float[n, 3, H, W] with other colours, some of them reduced, some as JPEG files."""
    n, side = len(pictures), pictures.shape[-1]
    if tint:
        hue, saturation = uniform(n, -18, 18).deg2rad() * tint, 1 + uniform(n, -0.45, 0.35) * tint
        saturation[torch.rand(n) < 0.05 * tint] = 0
        contrast, light = 1 + uniform(n, -0.25, 0.25) * tint, uniform(n, -25, 25) * tint
        turned = torch.zeros(n, 3, 3)
        turned[:, 0, 0], turned[:, 1, 1], turned[:, 2, 2] = (
            torch.ones(n),
            saturation * hue.cos(),
            saturation * hue.cos(),
        )
        turned[:, 1, 2], turned[:, 2, 1] = -saturation * hue.sin(), saturation * hue.sin()
        mixed, offset = torch.linalg.inv(YIQ) @ turned @ YIQ * contrast[:, None, None], 128 * (1 - contrast) + light
        kept = torch.rand(n) < 0.3
        mixed[kept], offset[kept] = torch.eye(3), 0.0
        pictures = (torch.bmm(mixed, pictures.flatten(2)).view_as(pictures) + offset.view(n, 1, 1, 1)).clamp(0, 255)
    chance = torch.rand(n)
    for low, high, scale in ((0, 0.1, 0.27), (0.1, 0.2, 0.33), (0.2, 0.35, 0.6)):
        if (which := (chance >= low) & (chance < high)).any():
            small = F.interpolate(pictures[which], (round(side * scale),) * 2, mode="bilinear", antialias=True)
            pictures[which] = F.interpolate(small, (side, side), mode="bilinear")
    for i in torch.where(torch.rand(n) < 0.2)[0].tolist():
        file = io.BytesIO()
        Image.fromarray(pictures[i].round().byte().permute(1, 2, 0).numpy()).save(
            file, "JPEG", quality=np.random.randint(20, 70)
        )
        pictures[i] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()
    return pictures


def copied(pictures: torch.Tensor) -> torch.Tensor:
    """Copies of pictures float[n, 3, H, H]: a third of them as JPEG files, a third cut, a third reduced and enlarged."""
    side, out = pictures.shape[-1], pictures.clone()
    for i, kind in enumerate(np.random.randint(0, 3, len(pictures))):
        if kind == 0:
            file = io.BytesIO()
            Image.fromarray(pictures[i].round().byte().permute(1, 2, 0).numpy()).save(
                file, "JPEG", quality=np.random.randint(22, 45)
            )
            out[i] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()
            continue
        part = round(side * np.random.uniform(*((0.88, 0.95) if kind == 1 else (0.26, 0.4))))
        top, left = np.random.randint(0, side - part + 1, 2)
        if kind == 1:
            small = pictures[i : i + 1, :, top : top + part, left : left + part]
        else:
            small = F.interpolate(pictures[i : i + 1], (part, part), mode="bilinear", antialias=True)
        out[i] = F.interpolate(small, (side, side), mode="bilinear")[0]
    return out


def characters(data: Mapping[str, np.ndarray], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Characters of fonts and handwritten digits, in two colours, half of them through 8 x 8 pixels, with their labels."""
    ink, labels = [], []
    for _ in range(n):
        name, border = ("digits", 3) if np.random.rand() < 0.5 else ("characters", 0)
        i = np.random.randint(len(data[name]))
        cut = data[name][i][border : len(data[name][i]) - border, border : len(data[name][i]) - border]
        ink.append(
            np.asarray(
                Image.fromarray(np.ascontiguousarray(cut)).resize((72, 72), Image.Resampling.BILINEAR), np.float32
            )
        )
        labels.append(int(data[f"{name}_labels"][i]))
    angle, zoom, stretch = uniform(n, -12, 12).deg2rad(), uniform(n, 0.85, 1.2), uniform(n, -0.3, 0.3).exp()
    across = torch.stack(
        [stretch / zoom * angle.cos(), uniform(n, -0.25, 0.25) - angle.sin() / zoom, uniform(n, -0.08, 0.08)], 1
    )
    down = torch.stack([angle.sin() / zoom, angle.cos() / zoom / stretch, uniform(n, -0.08, 0.08)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), [n, 1, SIDE, SIDE], align_corners=False)
    page = F.grid_sample(torch.from_numpy(np.stack(ink))[:, None], grid, align_corners=False)
    coarse = F.interpolate(F.interpolate(page, (8, 8), mode="area"), (SIDE, SIDE), mode="bicubic").clamp(0, 255)
    page = torch.where(torch.rand(n, 1, 1, 1) < 0.55, coarse, page)
    page = (page * uniform(n, 0.7, 1.3).view(n, 1, 1, 1)).clamp(0, 255) / 255
    plain, swapped = (torch.rand(n) < 0.6).view(n, 1, 1, 1), (torch.rand(n) < 0.35).view(n, 1, 1, 1)
    light = torch.where(plain, torch.full((n, 3, 1, 1), 255.0), torch.rand(n, 3, 1, 1) * 255)
    dark = torch.where(plain, torch.zeros(n, 3, 1, 1), torch.rand(n, 3, 1, 1) * 255)
    light, dark = torch.where(swapped, dark, light), torch.where(swapped, light, dark)
    return dark + page * (light - dark), torch.tensor(labels)


# --- The encoder, on some of the patches ------------------------------------------------------------------------------

ENLARGE = F.interpolate(torch.eye(SIDE)[None], size=224, mode="linear")[0].T[80:96, 24:31].contiguous()
"""float[16, 7]: the 16 pixels of a patch from 5 of a view and one more on either side."""


def embedded(encoder: Any, pictures: torch.Tensor, seen: int, places: torch.Tensor | None = None) -> torch.Tensor:
    """CLS and `seen` patches of each picture, at random or at `places`, float[n, 1 + seen, D].

    Enlarging a view is part of the patch embedding.
    """
    n, embeddings = len(pictures), encoder.embeddings
    pixels, conv, positions = pictures / 127.5 - 1, embeddings.patch_embeddings, embeddings.position_embeddings
    if pictures.shape[-1] == 224:
        patches, weight = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=16, q=16), conv.weight.flatten(1)
    else:
        windows = F.pad(pixels, (1, 1, 1, 1), mode="replicate").unfold(2, 7, 5).unfold(3, 7, 5)
        patches = rearrange(windows, "b c h w p q -> b (h w) (c p q)")
        weight = torch.einsum("dcpq,pa,qb->dcab", conv.weight, ENLARGE, ENLARGE).flatten(1)
    if places is None:
        places = torch.rand(n, patches.shape[1]).topk(seen, 1).indices.sort(1).values
    patches = patches.gather(1, places[..., None].expand(-1, -1, patches.shape[-1]))
    tokens = F.linear(patches, weight, conv.bias) + positions[0, 1:][places]
    return torch.cat([(embeddings.cls_token + positions[:, :1]).expand(n, -1, -1), tokens], 1)


def encoded(encoder: Any, tokens: torch.Tensor, cls_only: bool) -> torch.Tensor:
    """float[n, 1 + N, D], or float[n, 1, D] with `cls_only`."""
    *layers, last = encoder.layers
    for layer in layers:
        tokens = layer(tokens)
    out: torch.Tensor = encoder.norm(last(tokens, cls_only=cls_only))
    return out


class Run(nn.Module):
    """The encoder with a vector for each label, category, sort and character, and the loss of one batch."""

    remembered: torch.Tensor
    who: torch.Tensor

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.data = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
        emoji = json.loads((folder / "emoji.json").read_text())
        self.of_id = [np.where(self.data["emoji_labels"] == i)[0] for i in range(len(emoji))]
        self.ids = [i for i, each in enumerate(emoji) if not each["held_out"] and len(self.of_id[i]) > 1]
        self.of_word = [w for w in (np.where(self.data["words_labels"] == i)[0] for i in range(1500)) if len(w) > 1]
        kinds, sorts = (sorted({each[name] for each in emoji}) for name in ("kind", "sort"))
        self.kind = torch.tensor([kinds.index(each["kind"]) for each in emoji])
        self.sort = torch.tensor([sorts.index(each["sort"]) for each in emoji])
        self.flag = kinds.index("Flags")
        self.fonts = fonts_in(folder / "fetched" / name for name in FONTS)
        self.english = english(folder / "fetched/an-array-of-english-words@2.0.0/package", held_out=False)
        self.chance = random.Random(0)
        self.encoder = OmniVisionModel.from_pretrained(START, attn_implementation="sdpa").train()
        self.letters = nn.Linear(128, 2 * (len(LETTERS) + 1 + MOST))
        self.register_buffer("remembered", torch.zeros(0, 128))
        self.register_buffer("who", torch.zeros(0, dtype=torch.long))
        self.vectors = nn.ParameterDict(self.means(len(kinds), len(sorts)))
        self.scenes = self.drawn(folder / "scenes")
        tokens = torch.from_numpy(self.scenes["tokens"][:200, 1:].reshape(-1, 128)).float()
        spread, axes = torch.linalg.eigh(tokens.T.cov())
        self.whiten = axes * (spread + 0.1 * spread.mean()).rsqrt()

    @torch.no_grad()
    def means(self, kinds: int, sorts: int) -> dict[str, nn.Parameter]:
        """The mean of what the encoder makes of some pictures of each label, category, sort and character."""
        shown = np.repeat(self.ids, 2)
        places = np.concatenate([np.random.choice(self.of_id[i], 2, replace=False) for i in self.ids])
        found = [
            self.cls(views(self.data["emoji"][part], self.data["photos"], tint=0.3))
            for part in np.array_split(places, max(1, len(places) // 100))
        ]
        emoji, labels = F.normalize(torch.cat(found), dim=1), torch.from_numpy(shown)
        letters, names = characters(self.data, SHOWN)
        written = F.normalize(torch.cat([self.cls(part) for part in letters.split(100)]), dim=1)
        of = {
            "id": (emoji, labels, len(self.of_id)),
            "kind": (emoji, self.kind[labels], kinds),
            "sort": (emoji, self.sort[labels], sorts),
            "character": (written, names, 71),
        }
        return {
            name: nn.Parameter(
                F.normalize(torch.zeros(n, 128).index_add(0, who, unit) + 1e-3 * torch.randn(n, 128), dim=1)
            )
            for name, (unit, who, n) in of.items()
        }

    def cls(self, pictures: torch.Tensor, seen: int = SEEN) -> torch.Tensor:
        """float[n, D]."""
        return encoded(self.encoder, embedded(self.encoder, pictures, seen), cls_only=True)[:, 0]

    def drawn(self, folder: Path) -> Mapping[str, np.ndarray]:
        """Scenes uint8[n, 3, 224, 224] and the tokens that the teacher gives them."""
        if not folder.exists():
            folder.mkdir()
            processor, teacher = (kind.from_pretrained(TEACHER) for kind in (OmniImageProcessor, OmniVisionModel))
            many = DenseScenes("train", STORED, processor, 31_000_000, 0.25, min_objects=1, max_objects=9, neutral=0.35)
            single = DenseScenes("train", STORED, processor, 32_000_000, min_objects=1, max_objects=1, neutral=0.1)
            pictures = torch.stack([(many if i % 4 else single)[i]["pixel_values"] for i in range(STORED)])
            with torch.no_grad():
                tokens = [teacher(part / 127.5 - 1).last_hidden_state.half() for part in pictures.split(40)]
            np.save(folder / "pictures.npy", pictures.numpy())
            np.save(folder / "tokens.npy", torch.cat(tokens).numpy())
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pictures", "tokens")}

    def photographs(self, which: np.ndarray) -> torch.Tensor:
        """Cuts of photographs, float[n, 3, 70, 70]."""
        cuts = []
        for i in which:
            side = np.random.randint(76, 113)
            top, left = np.random.randint(0, 113 - side, 2)
            cut = Image.fromarray(np.ascontiguousarray(self.data["photos"][i, top : top + side, left : left + side]))
            cuts.append(np.asarray(cut.resize((72, 72), Image.Resampling.BILINEAR))[1:71, 1:71])
        return torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2).float()

    def labelled(self, ids: int, icons: int, seen: int) -> torch.Tensor:
        """The loss of views: of labels, and of finding the other view."""
        data, photos, draw = self.data, self.data["photos"], np.random.choice
        shown = np.repeat(draw(self.ids, ids, replace=False), 2)
        emoji = np.concatenate([draw(self.of_id[i], 2, replace=False) for i in shown[::2]])
        mirrored = torch.where((torch.rand(2 * ids) < 0.15) & (self.kind[shown] != self.flag), -1.0, 1.0)
        words = np.concatenate(
            [draw(self.of_word[i], 2, replace=False) for i in draw(len(self.of_word), WORDS, replace=False)]
        )
        inks = np.where(np.random.rand(2 * WORDS) < 0.5, 0, np.random.randint(0, 256, (3, 2 * WORDS)))
        written = np.empty((2 * WORDS, 72, 72, 4), np.uint8)
        written[..., :3], written[..., 3] = inks.T[:, None, None], data["words"][words]
        letters, names = characters(data, CHARACTERS)
        parts = [
            views(data["emoji"][emoji], photos, mirrored=mirrored),
            views(np.repeat(data["icons"][draw(len(data["icons"]), icons, replace=False)], 2, 0), photos, tint=0.6),
            views(written, photos, turn=6.0),
            spoiled(self.photographs(np.repeat(draw(len(photos), PHOTOS, replace=False), 2)), 0.6),
            letters,
        ]
        unit, labels = F.normalize(self.cls(torch.cat(parts), seen), dim=1), torch.from_numpy(shown)
        emoji, pairs = len(labels), len(unit) - CHARACTERS

        def named(
            name: str, who: torch.Tensor, labels: torch.Tensor, scale: float, margin: float = 0.0
        ) -> torch.Tensor:
            cosines = who @ F.normalize(self.vectors[name], dim=1).T
            return F.cross_entropy((cosines - margin * F.one_hot(labels, cosines.shape[1])) * scale, labels)

        near = unit[:pairs] @ unit.T / 0.1
        near = near.masked_fill(torch.eye(pairs, len(unit), dtype=torch.bool), -1e4)
        other_view = F.cross_entropy(near, torch.arange(pairs) ^ 1, reduction="none")
        return (
            named("id", unit[:emoji], labels, 18.0, 0.1)
            + 0.4 * named("sort", unit[:emoji], self.sort[labels], 10.0)
            + 0.4 * named("kind", unit[:emoji], self.kind[labels], 8.0)
            + 0.5 * named("character", unit[pairs:], names, 12.0)
            + 0.25 * other_view[:emoji].mean()
            + 0.5 * other_view[emoji:].mean()
        )

    def copies(self) -> torch.Tensor:
        """The loss of finding the copy of a picture among those of this step and of the last ones."""
        data, draw, (emoji, icons, photos, scenes) = self.data, np.random.choice, COPIED
        sort = self.sort[draw(self.ids)]
        alike = [i for i in self.ids if self.sort[i] == sort]
        ids = draw(alike, min(len(alike), emoji // 2), replace=False)
        places = np.concatenate([draw(self.of_id[i], 2, replace=False) for i in ids])
        flat = np.concatenate([data["emoji"][places], data["icons"][draw(len(data["icons"]), icons, replace=False)]])
        rgba = torch.from_numpy(flat[:, 1:71, 1:71]).permute(0, 3, 1, 2).float()
        opaque = rgba[:, 3:] / 255
        small = rgba[:, :3] * opaque + 255 * (1 - opaque)
        small = torch.cat([small, self.photographs(draw(len(data["photos"]), photos, replace=False))])
        which = draw(len(self.scenes["pictures"]), scenes, replace=False)
        large = torch.from_numpy(self.scenes["pictures"][which]).float()
        n, side = len(small) + len(large), small.flatten(1)
        who = torch.cat([torch.from_numpy(np.repeat(ids, 2)), -1 - torch.randint(1 << 40, (icons + photos,))])
        who = torch.cat([who, torch.from_numpy(which) + 1_000_000])
        found = [self.cls(torch.cat([part, copied(part)]), 196).chunk(2) for part in (small, large)]
        unit = F.normalize(torch.cat([found[0][0], found[1][0], found[0][1], found[1][1]]), dim=1)
        near = torch.cat([unit @ unit.T, unit @ self.remembered.T], 1) / 0.05
        same = torch.eye(n, dtype=torch.bool)
        same[: len(small), : len(small)] |= torch.cdist(side, side, p=1) / side.shape[1] < 4.0  # drawn alike
        hidden = torch.cat([same.repeat(2, 2), who.repeat(2)[:, None] == self.who], 1)
        pair = torch.arange(2 * n).roll(n)
        hidden[torch.arange(2 * n), pair] = False
        loss = F.cross_entropy(near.masked_fill(hidden, -1e4), pair)
        self.remembered = torch.cat([unit.detach(), self.remembered])[:REMEMBERED]
        self.who = torch.cat([who.repeat(2), self.who])[:REMEMBERED]
        return loss

    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the tokens of scenes are from the teacher's: CLS; patches and their mean, all directions alike."""
        which = np.random.choice(STORED, SCENES, replace=False)
        scenes = torch.from_numpy(self.scenes["pictures"][which]).float()
        before = torch.from_numpy(self.scenes["tokens"][which]).float()
        now = encoded(self.encoder, embedded(self.encoder, scenes, 196), cls_only=False)
        off = (now - before)[:, 1:] @ self.whiten
        mean = (before[:, 1:] @ self.whiten).mean(1).var(0).mean()
        return (
            F.mse_loss(now[:, 0], before[:, 0]) / before[:, 0].var(),
            off.square().mean() + off.mean(1).square().mean() / mean,
        )

    def spelled(self, words: int, seen: int = SEEN) -> torch.Tensor:
        """The loss of naming the letters that patches show, and their places in the word."""
        shown = [
            drawn(choose(self.chance, self.english), self.chance.choice(self.fonts), self.chance, self.data["photos"])
            for _ in range(words)
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture, _ in shown])).permute(0, 3, 1, 2).float()
        labels = torch.from_numpy(np.stack([labels for _, labels in shown])).unflatten(-1, (14, 2)).flatten(2, 3)
        wanted = (labels[:, 0, :, 0] != -100).float()  # the rows of patches with letters first, then any
        places = (wanted + torch.rand_like(wanted)).topk(seen, 1).indices.sort(1).values
        grid = encoded(self.encoder, embedded(self.encoder, pixels, seen, places), cls_only=False)[:, 1:]
        labels = labels.gather(2, places[:, None, :, None].expand(-1, 2, -1, 2))
        letters, ranks = self.letters(grid).unflatten(-1, (2, -1)).split([len(LETTERS) + 1, MOST], -1)
        return F.cross_entropy(
            letters.flatten(0, 2), labels[:, 0].flatten(), ignore_index=-100
        ) + 0.5 * F.cross_entropy(ranks.flatten(0, 2), labels[:, 1].flatten(), ignore_index=-100)

    def forward(self, whole: bool) -> dict[str, torch.Tensor]:
        """The losses of a new batch, in which all patches of the views are seen or some."""
        ids, icons = (max(2, n // (2 if whole else 1)) for n in (IDS, ICONS))
        seen = 196 if whole else SEEN
        cls, grid = self.kept()
        return {
            "views": self.labelled(ids, icons, seen),
            "copies": self.copies(),
            "letters": self.spelled(SPELLED),
            "scenes, CLS": 0.5 * cls,
            "scenes": 2.0 * grid,
        }


def main(folder: Path, output: Path, minutes: float, kind: type[Run] = Run) -> None:
    """Train, or go on, and save."""
    torch.manual_seed(0)
    np.random.seed(0)
    run = kind(folder)
    of_layers = [p for name, p in run.encoder.named_parameters() if name.startswith("layers") and p.ndim == 2]
    of_others = [p for name, p in run.encoder.named_parameters() if not (name.startswith("layers") and p.ndim == 2)]
    muon = Muon([{"params": of_layers, "lr": RATE, "weight_decay": 0.01}])
    adam = torch.optim.AdamW(
        [
            {"params": [*of_others, *run.letters.parameters()], "lr": RATE / 2},
            {"params": run.vectors.parameters(), "lr": RATE * 2},
        ],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    parts: dict[str, Any] = {"run": run, "muon": muon, "adam": adam}
    rates = [(group, group["lr"]) for optimizer in (muon, adam) for group in optimizer.param_groups]
    spent, step, state = 0.0, 0, output / "state.pt"
    if state.exists():
        held = torch.load(state)
        run.remembered, run.who = held["run"]["remembered"], held["run"]["who"]
        for name, part in parts.items():
            part.load_state_dict(held[name])
        spent, step = held["spent"], held["step"]
    start, saved = time.process_time() - spent, spent
    while (done := (time.process_time() - start) / 60 / minutes) < 1:
        for group, rate in rates:
            group["lr"] = rate * min(1, (step + 1) / WARMUP) * min(1, max(0.01, 1.6 * (1 - done)))
        losses = run(done > WHOLE_FROM)
        torch.stack([*losses.values()]).sum().backward()
        nn.utils.clip_grad_norm_(run.encoder.parameters(), 2.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            print(f"step {step}, {done:.1%}:", *(f"{k} {v.item():.3f}" for k, v in losses.items()), flush=True)
        if (spent := time.process_time() - start) - saved > SAVED:
            saved = spent
            save(run, output)
            torch.save(
                {name: part.state_dict() for name, part in parts.items()} | {"spent": spent, "step": step}, state
            )
    save(run, output)


def save(run: Run, output: Path) -> None:
    """Save the encoder with its image processor, and what names letters."""
    run.encoder.save_pretrained(output)
    OmniImageProcessor.from_pretrained(START).save_pretrained(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))

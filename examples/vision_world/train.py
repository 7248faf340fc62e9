"""Train `checkpoints/vision_world` from `checkpoints/vision_tiny`, on the pictures that pictures.py made.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 6 examples/vision_world/train.py runs/world runs/vision_world 60

The last argument is the time in minutes; the learning rate falls to nothing at its end. Each step shows one batch, and CLS
learns four things at once:

* an emoji, as two vendors draw it, has the same label, category and sort (softmax over cosines to one learned vector each);
* of all pictures in the batch, the other view of a picture is nearest (InfoNCE): an emoji of two vendors, a word in two
  fonts, and an icon or a photograph that is cut, turned, tinted, reduced and compressed in two ways;
* a character, in any font or as a scan of handwriting, often of 8 x 8 pixels, has a label of its own;
* scenes keep the tokens that they had before, CLS and grid (distillation), also as JPEG files and reduced.

Most pictures are small, and most of the time the encoder sees only a random third of their patches (FLIP, Li et al. 2022).
"""

import io
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn

from omni import OmniImageProcessor, OmniVisionModel
from omni.scenes.dense import DenseScenes
from omni.training.optimizer import Muon

START = "checkpoints/vision_tiny"
IDS, ICONS, CHARACTERS, WORDS, PHOTOS, SCENES = 10, 3, 5, 1, 2, 3
"""What a process shows in a step: two views each of emoji, icons, words and photographs; single characters and scenes."""
RATE, WARMUP = 0.003, 30
SEEN, WHOLE_FROM = 64, 0.78
"""Patches of a picture that are seen, and the share of the time after which all are."""
SIDE = 70
"""Side of the views. The encoder's 224 pixels are these, enlarged by 3.2: 5 of them are a patch."""
STORED = 4400
"""Scenes that are drawn before training, with the tokens to keep."""
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


def characters(data: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Characters of fonts and handwritten digits, in two colours, half of them through 8 x 8 pixels, with their labels."""
    n, ink, labels = CHARACTERS, [], []
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


def embedded(encoder: Any, pictures: torch.Tensor, seen: int) -> torch.Tensor:
    """CLS and `seen` patches of each picture, float[n, 1 + seen, D]. Enlarging a view is part of the patch embedding."""
    n, embeddings = len(pictures), encoder.embeddings
    pixels, conv, positions = pictures / 127.5 - 1, embeddings.patch_embeddings, embeddings.position_embeddings
    if pictures.shape[-1] == 224:
        patches, weight = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=16, q=16), conv.weight.flatten(1)
    else:
        windows = F.pad(pixels, (1, 1, 1, 1), mode="replicate").unfold(2, 7, 5).unfold(3, 7, 5)
        patches = rearrange(windows, "b c h w p q -> b (h w) (c p q)")
        weight = torch.einsum("dcpq,pa,qb->dcab", conv.weight, ENLARGE, ENLARGE).flatten(1)
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
        self.encoder = OmniVisionModel.from_pretrained(START, attn_implementation="sdpa").train()
        sizes = {"id": len(emoji), "kind": len(kinds), "sort": len(sorts), "character": 71}
        self.vectors = nn.ParameterDict(
            {name: nn.Parameter(F.normalize(torch.randn(n, 128), dim=1)) for name, n in sizes.items()}
        )
        self.scenes = self.drawn(folder / "scenes")

    def drawn(self, folder: Path) -> Mapping[str, np.ndarray]:
        """Scenes uint8[n, 3, 224, 224] and the tokens that the encoder gives them before training."""
        if not folder.exists() and int(dist.get_rank()) == 0:
            folder.mkdir()
            processor = OmniImageProcessor.from_pretrained(START)
            many = DenseScenes("train", STORED, processor, 31_000_000, 0.25, min_objects=1, max_objects=9, neutral=0.35)
            single = DenseScenes("train", STORED, processor, 32_000_000, min_objects=1, max_objects=1, neutral=0.1)
            pictures = torch.stack([(many if i % 4 else single)[i]["pixel_values"] for i in range(STORED)])
            with torch.no_grad():
                tokens = [self.encoder(part / 127.5 - 1).last_hidden_state.half() for part in pictures.split(40)]
            np.save(folder / "pictures.npy", pictures.numpy())
            np.save(folder / "tokens.npy", torch.cat(tokens).numpy())
        dist.barrier()
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pictures", "tokens")}

    def batch(self, ids: int, icons: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views float[n, 3, 70, 70], emoji first, characters last; the labels of emoji and of characters."""
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
        cuts = []
        for i in np.repeat(draw(len(photos), PHOTOS, replace=False), 2):
            side = np.random.randint(76, 113)
            top, left = np.random.randint(0, 113 - side, 2)
            cut = Image.fromarray(np.ascontiguousarray(photos[i, top : top + side, left : left + side]))
            cuts.append(np.asarray(cut.resize((72, 72), Image.Resampling.BILINEAR))[1:71, 1:71])
        letters, names = characters(data)
        parts = [
            views(data["emoji"][emoji], photos, mirrored=mirrored),
            views(np.repeat(data["icons"][draw(len(data["icons"]), icons, replace=False)], 2, 0), photos, tint=0.6),
            views(written, photos, turn=6.0),
            spoiled(torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2).float(), 0.6),
            letters,
        ]
        return torch.cat(parts), torch.from_numpy(shown), names

    def forward(self, whole: bool) -> torch.Tensor:
        """The loss of a new batch, in which all patches are seen or some."""
        pictures, ids, names = self.batch(*(max(2, n // (2 if whole else 1)) for n in (IDS, ICONS)))
        which = np.random.choice(STORED, SCENES, replace=False)
        scenes = torch.from_numpy(self.scenes["pictures"][which]).float()
        scenes[: SCENES // 2] = spoiled(scenes[: SCENES // 2], 0.0)
        before = torch.from_numpy(self.scenes["tokens"][which]).float()
        now = encoded(self.encoder, embedded(self.encoder, scenes, 196), cls_only=False)
        cls = encoded(self.encoder, embedded(self.encoder, pictures, 196 if whole else SEEN), cls_only=True)[:, 0]
        unit, emoji = F.normalize(cls, dim=1), len(ids)

        def named(
            vectors: str, who: torch.Tensor, labels: torch.Tensor, scale: float, margin: float = 0.0
        ) -> torch.Tensor:
            cosines = who @ F.normalize(self.vectors[vectors], dim=1).T
            return F.cross_entropy((cosines - margin * F.one_hot(labels, cosines.shape[1])) * scale, labels)

        pairs = len(unit) - CHARACTERS
        near = unit[:pairs] @ unit.T / 0.1
        near = near.masked_fill(torch.eye(pairs, len(unit), dtype=torch.bool), -1e4)
        other_view = F.cross_entropy(near, torch.arange(pairs) ^ 1, reduction="none")
        kept = [
            F.mse_loss(now[:, part], before[:, part]) / before[:, part].var() for part in (slice(1), slice(1, None))
        ]
        return (
            named("id", unit[:emoji], ids, 18.0, 0.1)
            + 0.4
            * (named("sort", unit[:emoji], self.sort[ids], 10.0) + named("kind", unit[:emoji], self.kind[ids], 8.0))
            + 0.5 * named("character", unit[pairs:], names, 12.0)
            + 0.25 * other_view[:emoji].mean()
            + 0.5 * other_view[emoji:].mean()
            + 2.0 * (kept[0] + kept[1])
        )


def main(folder: Path, output: Path, minutes: float) -> None:
    """Train in all processes, and let the first one save."""
    torch.manual_seed(0)
    run = Run(folder)
    torch.manual_seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    of_layers = [p for name, p in run.encoder.named_parameters() if name.startswith("layers") and p.ndim == 2]
    of_others = [p for name, p in run.encoder.named_parameters() if not (name.startswith("layers") and p.ndim == 2)]
    muon = Muon([{"params": of_layers, "lr": RATE, "weight_decay": 0.01}])
    adam = torch.optim.AdamW(
        [{"params": of_others, "lr": RATE / 2}, {"params": run.vectors.parameters(), "lr": RATE * 2}],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    groups = [*muon.param_groups, *adam.param_groups]
    rates, parameters = [group["lr"] for group in groups], list(run.parameters())
    start, step = time.time(), 0
    while (done := told(min(1.0, (time.time() - start) / 60 / minutes))) < 1:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / WARMUP) * min(1, max(0.01, 2 * (1 - done)))
        loss = run(done > WHOLE_FROM)
        loss.backward()
        flat = torch.cat([torch.as_tensor(p.grad).flatten() for p in parameters]) / dist.get_world_size()
        dist.all_reduce(flat)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)
        nn.utils.clip_grad_norm_(run.encoder.parameters(), 2.0)
        for optimizer in (muon, adam):
            optimizer.step()
        step += 1
        if step % 20 == 0 and dist.get_rank() == 0:
            print(f"step {step}, {done:.0%} of the time, loss {loss.item():.2f}", flush=True)
    if dist.get_rank() == 0:
        run.encoder.save_pretrained(output)
        OmniImageProcessor.from_pretrained(START).save_pretrained(output)


def told(value: float) -> float:
    """A number of the first process, in all processes."""
    held = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(held, 0)
    return held.item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
    dist.destroy_process_group()

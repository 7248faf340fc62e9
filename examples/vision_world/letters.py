"""Train `vision_world` on to read. No checkpoint is made by it yet (docs/experiments.md, section 14).

    OMP_NUM_THREADS=1 python examples/vision_world/letters.py runs/world runs/vision_letters 13

Nearly all pictures are printed words, whose patches name their letter and its place in the word. Emoji and scenes keep the
tokens of `vision_world` (distillation).
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import train
from train import Run, main, views

WORDS, SEEN, KEPT = 96, 48, (6, 2)
"""Words in a step, and their patches that are seen, at the end a third with all patches; emoji and scenes."""


class Reader(Run):
    """The encoder, with the loss of letters and of the tokens that it had before."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.before = [copy.deepcopy(self.encoder).requires_grad_(False)]  # a list, so that it is not saved

    def forward(self, whole: bool) -> dict[str, torch.Tensor]:
        """The losses of a new batch."""
        emoji, scenes = KEPT
        places = np.random.choice(len(self.data["emoji"]), emoji, replace=False)
        which = np.random.choice(len(self.scenes["pictures"]), scenes, replace=False)
        small = views(self.data["emoji"][places], self.data["photos"], tint=0.3)
        pictures = [F.interpolate(small, (224, 224), mode="bilinear"), torch.from_numpy(self.scenes["pictures"][which])]
        pixels = torch.cat(pictures) / 127.5 - 1
        with torch.no_grad():
            before = self.before[0](pixels).last_hidden_state
        off = (self.encoder(pixels).last_hidden_state - before).square().mean((0, 2)) / before.var()
        letters = self.spelled(WORDS // 3, 196) if whole else self.spelled(WORDS, SEEN)
        return {"letters": letters, "kept, CLS": 2.0 * off[0], "kept": off[1:].mean()}


if __name__ == "__main__":
    train.START = "checkpoints/vision_world" if len(sys.argv) < 5 else sys.argv[4]
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), Reader)

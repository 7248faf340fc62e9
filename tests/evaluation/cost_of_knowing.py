"""What it costs that an answer says how sure it is, and what is unlike training.

    python tests/evaluation/cost_of_knowing.py checkpoints/omni_tiny

Each question about a scene is asked with the statistics of the checkpoint and without them, in turns. Seconds are those of
the CPU, the least of several, because other processes take turns, too.
"""

import sys
import time

import numpy as np
import torch

from omni.loading.checkpoint import load
from omni.scenes.drawing import render
from omni.scenes.questions import questions
from omni.scenes.scene import sample_scene
from omni.session import Session


def main(folder: str, scenes: int = 12, turns: int = 6) -> None:
    """Print the mean time of an answer with and without."""
    torch.set_num_threads(1)
    model, processor = load(folder)
    known = model.familiarity
    seconds = np.empty((scenes, turns + 1, 2))  # the first turn warms up
    for number in range(scenes):
        scene = sample_scene(100_000 + number, "test")
        asked, picture = questions(scene, 0), render(scene)
        for turn in range(turns + 1):
            for which, familiarity in enumerate((known, None)):
                model.familiarity = familiarity
                session = Session(model, processor, [picture])
                start = time.process_time()
                session.ask(asked[number % len(asked)].text)
                seconds[number, turn, which] = time.process_time() - start
    least = seconds[:, 1:].min(1)
    told, untold = 1000 * least.mean(0)
    share = np.median(least[:, 0] / least[:, 1]) - 1
    sys.stdout.write(f"{told:.2f} ms an answer, {untold:.2f} ms without; {share:+.2%} (median of {scenes} questions)\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

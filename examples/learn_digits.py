"""Train the shipped model on your own folder. Here it holds scikit-learn's handwritten digits, 1,797 scans of 43 writers.

    python examples/learn_digits.py digits      # writes digits/train/<digit>/*.png and digits/test, and trains on them

A fifth is held out. With your own files, start where the files are written.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

root, settings = Path(sys.argv[1]), sys.argv[2:]
question = "Which digit is it?"

digits = load_digits()
parts = train_test_split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
for folder, part in zip((root / "train", root / "test"), parts, strict=True):
    for number in part:
        path = folder / str(digits.target[number]) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scan = Image.fromarray((digits.images[number] * 255 / 16).astype(np.uint8))
        scan.resize((64, 64), Image.Resampling.BICUBIC).save(path)


def omni(*arguments: str | Path) -> None:
    """Run the command."""
    subprocess.run([sys.executable, "-m", "omni", *map(str, arguments)], check=True)


own = [f"train.path={root}/train", f"evaluate.path={root}/test", f"output={root}/model"]
own += [f"train.prompt={question}", f"evaluate.prompt={question}"]
omni("check-data", root / "train", "--test", root / "test")
omni("train", "configs/train_pictures.json", *(word for setting in own for word in ("--set", setting)), *settings)
omni("evaluate", root / "model", "--data", root / "test", "--prompt", question)

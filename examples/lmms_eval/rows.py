"""The functions that rows.yaml names."""

from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path("drawings")
"""The folder that the paths of the rows start from."""


def pictures(row: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a row."""
    return [Image.open(ROOT / row["image"]).convert("RGB")]


def score(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1 for the answer of the row, 0 for any other."""
    return {"exact_match": float(answers[0].strip() == row["answer"])}

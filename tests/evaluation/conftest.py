"""The shipped checkpoints, and a small manifest of pictures on disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni import scenes

FUSED = Path("checkpoints/omni_tiny")
ENCODER = Path("checkpoints/vision_tiny")


@pytest.fixture(scope="session")
def fused() -> Path:
    return FUSED


@pytest.fixture(scope="session")
def vision() -> Path:
    return ENCODER


@pytest.fixture(scope="session")
def shipped() -> Any:
    from omni.loading.checkpoint import load

    return load(FUSED)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The fused checkpoint, free to be changed."""
    return Path(shutil.copytree(FUSED, tmp_path / "copy", ignore=shutil.ignore_patterns("run")))


@pytest.fixture
def make_manifest(tmp_path: Path) -> Callable[..., Path]:
    """`make_manifest([{...}, ...], pictures=n)`: a .jsonl with these rows beside `0.png` to `n-1.png`, a single object each.

    Without rows, the colour of each object is asked for.
    """

    def make(rows: list[dict[str, Any]] | None = None, pictures: int = 4) -> Path:
        shown = [scenes.sample_scene(700_000 + seed, "test", max_objects=1) for seed in range(pictures)]
        for number, scene in enumerate(shown):
            scenes.render(scene).save(tmp_path / f"{number}.png")
        if rows is None:
            rows = [
                {"image": f"{n}.png", "question": "what color is the object", "answer": scene.objects[0].color}
                for n, scene in enumerate(shown)
            ]
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return make

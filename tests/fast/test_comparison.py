"""`omni bench --verify` says how much each fast path differs, and notices one that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from omni.cli.app import app
from omni.embedding.engine import TOLERANCE
from omni.fast.packing import PackedVisionModel
from omni.fast.quick_step import QuickStep


@pytest.fixture(scope="module")
def folder(make_pair: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused model that goes on for ever, so a wrong step has many tokens to show in."""
    model, processor = make_pair()
    saved = tmp_path_factory.mktemp("fused")
    for part in (model, processor):
        part.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def encoder(make_pair: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = make_pair()
    saved = tmp_path_factory.mktemp("encoder")
    for part in (model.model.image_tower, processor.image_processor):
        part.save_pretrained(saved)
    return saved


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.fast.comparison.WRITTEN", 8)


def bench(folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    arguments = ["bench", "--verify", "--checkpoint", str(folder), "--pictures", "1", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return result.exit_code, {path["name"]: path for path in json.loads(result.stdout)}


def test_every_fast_path_is_compared(folder: Path) -> None:
    code, found = bench(folder)
    assert code == 0
    assert {f"{what}, {dtype}" for what in ("cls", "grid", "projected") for dtype in TOLERANCE} < {*found}
    answers = [path for path in found.values() if path["of"] == "answers"]
    assert len(answers) == 3
    assert all(0 <= path["right"] <= 1 and 0 <= path["reference_right"] <= 1 for path in answers)
    # scaled decoding, for vectors and for answers, is for who asks for it
    assert [path["of"] for path in found.values() if path["tolerance"] is None] == ["embeddings", "answers"]
    for path in found.values():
        assert min(path["speed"], path["reference_speed"]) > 0
        assert path["within"]
    assert (
        0 < found["cls, float32"]["difference"] <= found["cls, bfloat16"]["difference"]
    )  # equal where it does not pay


def test_answers_that_differ_are_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = QuickStep.__call__
    monkeypatch.setattr(QuickStep, "__call__", lambda *args: step(*args).roll(1, -1))
    monkeypatch.setattr(
        "omni.fast.generation._difference", lambda step, language_model: 0.0
    )  # or it would not be taken at all
    code, found = bench(folder)
    assert code == 1
    held = [path for path in found.values() if path["of"] == "answers" and path["tolerance"] is not None]
    assert len(held) == 2
    assert all(not path["within"] and path["difference"] > 0.5 for path in held)


def test_a_fast_path_that_is_off_is_not_taken(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedVisionModel.__call__

    def off(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = packed(self, *args, **kwargs)
        for name in ("cls", "grid"):
            if output.get(name) is not None:
                output[name] = output[name] * 1.1
        return output

    monkeypatch.setattr(PackedVisionModel, "__call__", off)
    code, found = bench(encoder)
    assert code == 0
    assert found["cls, float32"]["difference"] == pytest.approx(0, abs=1e-6)  # the encoder itself


def test_peers_are_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.__file__", str(tmp_path / "site-packages" / "omni" / "__init__.py"))
    result = CliRunner().invoke(app, ["bench", "encoder"])
    assert result.exit_code == 2
    assert "a clone of omni's repository" in result.stderr
    result = CliRunner().invoke(app, ["bench", "encoder", "--verify"])
    assert result.exit_code == 2
    assert "found encoder; leave them out" in result.stderr
    result = CliRunner().invoke(app, ["bench", "--json"])
    assert result.exit_code == 2
    assert "need --verify" in result.stderr


def test_an_encoder_alone_has_no_answers(encoder: Path) -> None:
    code, found = bench(encoder)
    assert code == 0
    assert {path["of"] for path in found.values()} == {"embeddings"}
    assert not any("projected" in name for name in found)

"""What cannot be used is refused in a sentence that names it; nothing that a file brings is run, and nothing is written."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from omni.exchange.micro_omni import ConversionError, convert, to_micro_omni


def refuse(sources: list[Path], output: Path) -> str:
    """The sentence that comes instead of a checkpoint, of which no trace is left."""
    before = sorted(os.listdir(output.parent))
    with pytest.raises(ConversionError) as refused:
        convert(sources, output)
    assert sorted(os.listdir(output.parent)) == before
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def vision(micro_omni: Any) -> dict[str, Any]:
    return {"vit": dict(micro_omni.encoder.state_dict()), "config": {"vision": micro_omni.vision}}


class Malice:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_what_would_run_code_is_refused(micro_omni: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({**vision(micro_omni), "extra": Malice(trace)}, tmp_path / "zip.pt")
    torch.save(
        {**vision(micro_omni), "extra": Malice(trace)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Malice(trace)))
    torch.save(micro_omni.encoder, tmp_path / "module.pt")  # a whole module is code, too
    for name, what in {"zip": "mkdir", "old": "mkdir", "bare": "than tensors", "module": "Encoder"}.items():
        sentence = refuse([tmp_path / f"{name}.pt"], tmp_path / "ours")
        assert f"{name}.pt" in sentence
        assert what in sentence
        assert "nothing of it was run" in sentence
    assert not trace.exists()
    pickle.loads((tmp_path / "bare.pt").read_bytes())
    assert trace.exists()  # it would have been


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_text("vision")])
@pytest.mark.parametrize("name", ["vision.pt", "model.safetensors"])
def test_damaged_files_are_refused(damage: Callable[[Path], None], name: str, micro_omni: Any, tmp_path: Path) -> None:
    if name.endswith(".pt"):
        torch.save(vision(micro_omni), tmp_path / name)
    else:
        save_file(micro_omni.merged(), tmp_path / name)
    damage(tmp_path / name)
    assert name in refuse([tmp_path / name], tmp_path / "ours")


def without(parts: dict[str, Any]) -> None:
    del parts["vit"]["blocks.1.norm2.bias"]


def strange(parts: dict[str, Any]) -> None:
    parts["vit"]["blocks.1.gate"] = torch.zeros(3)


def another_shape(parts: dict[str, Any]) -> None:
    parts["vit"]["blocks.0.linear2.bias"] = torch.zeros(3)


def another_type(parts: dict[str, Any]) -> None:
    parts["vit"]["norm.weight"] = parts["vit"]["norm.weight"].double()


def another_part(parts: dict[str, Any]) -> None:
    parts["depth_head"] = {"weight": torch.zeros(2, 2)}


def twice(parts: dict[str, Any]) -> None:
    parts["vit"]["blocks.0._orig_mod.norm1.bias"] = parts["vit"]["blocks.0.norm1.bias"]


def no_square(parts: dict[str, Any]) -> None:
    parts["vit"]["pos"] = parts["vit"]["pos"][:, :-1]


def other_width(parts: dict[str, Any]) -> None:
    parts["config"]["vision"] = {**parts["config"]["vision"], "d_model": 64}


def no_heads(parts: dict[str, Any]) -> None:
    parts["config"] = {}


@pytest.mark.parametrize(("change", "named"), [
    (without, "missing: blocks.1.norm2.bias"),
    (strange, "without a place: blocks.1.gate"),
    (another_shape, "blocks.0.linear2.bias is (3,) instead of (32,)"),
    (another_type, "types float32, float64"),
    (another_part, "have no place: depth_head"),
    (twice, "'blocks.0.norm1.bias' twice"),
    (no_square, "16 positions"),
    (other_width, "d_model 64 (32)"),
    (no_heads, "do not tell how many heads"),
])  # fmt: skip
def test_tensors_without_a_place_are_named(
    change: Callable[[dict[str, Any]], None], named: str, micro_omni: Any, tmp_path: Path
) -> None:
    parts = vision(micro_omni)
    change(parts)
    torch.save(parts, tmp_path / "vision.pt")
    assert named in refuse([tmp_path / "vision.pt"], tmp_path / "ours")


def test_a_merged_file_with_a_strange_prefix_is_refused(micro_omni: Any, tmp_path: Path) -> None:
    save_file(micro_omni.merged() | {"depth.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "have no place: depth.weight" in refuse([tmp_path / "model.safetensors"], tmp_path / "ours")


def test_a_projector_of_another_encoder_is_refused(micro_omni: Any, tmp_path: Path) -> None:
    theirs = micro_omni.write(tmp_path / "theirs")
    parts = torch.load(theirs / "omni.pt", weights_only=True)
    torch.save({**parts, "proj_v": {"weight": torch.zeros(64, 24), "bias": torch.zeros(64)}}, theirs / "omni.pt")
    assert "weight is (64, 24) instead of (64, 32)" in refuse([theirs], tmp_path / "ours")


def test_what_is_missing_or_there_twice_is_said(micro_omni: Any, tmp_path: Path) -> None:
    theirs = micro_omni.write(tmp_path / "theirs")
    parts = torch.load(theirs / "omni.pt", weights_only=True)
    torch.save({"model": parts["thinker"]}, theirs / "thinker.pt")
    assert "holds a thinker, and so does a file before it" in refuse([theirs], tmp_path / "ours")
    assert "omni.pt vision.pt" in refuse([theirs / "vision.pt", theirs / "thinker.pt"], tmp_path / "ours")
    (theirs / "vision.pt").unlink()
    assert "no vision_encoder" in refuse([theirs / "omni.pt"], tmp_path / "ours")
    assert "does not exist" in refuse([theirs / "vision.pt"], tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    assert "holds no file of micro-Omni's" in refuse([tmp_path / "empty"], tmp_path / "ours")
    assert "Found nothing in" in refuse([theirs / "tokenizer.model"], tmp_path / "ours")
    (theirs / "config.json").write_text("{")
    assert "is no JSON" in refuse([theirs / "thinker.pt"], tmp_path / "ours")


def test_configurations_that_disagree_are_refused(micro_omni: Any, tmp_path: Path) -> None:
    torch.save(vision(micro_omni), tmp_path / "vision.pt")
    (tmp_path / "mine.json").write_text(json.dumps({**micro_omni.vision, "n_heads": 2}))
    named = [tmp_path / "vision.pt", tmp_path / "mine.json"]
    assert "do not agree on n_heads" in refuse(named, tmp_path / "ours")


@pytest.mark.parametrize(("settings", "named"), [
    ({"n_heads": "two"}, "n_heads 'two'"),
    ({"dropout": "none"}, "hidden_dropout_prob"),
    ("tiny", "'tiny' as the section 'vision'"),
])  # fmt: skip
def test_settings_of_a_wrong_kind_are_named(settings: Any, named: str, micro_omni: Any, tmp_path: Path) -> None:
    config = {**micro_omni.vision, **settings} if isinstance(settings, dict) else settings
    torch.save({**vision(micro_omni), "config": {"vision": config}}, tmp_path / "vision.pt")
    assert named in refuse([tmp_path / "vision.pt"], tmp_path / "ours")


def test_nothing_is_overwritten(micro_omni: Any, tmp_path: Path) -> None:
    torch.save(vision(micro_omni), tmp_path / "vision.pt")
    for name in ("folder", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder/mine.txt").write_text("mine")
    assert "nothing is overwritten" in refuse([tmp_path / "vision.pt"], tmp_path / "folder")
    assert "nothing is overwritten" in refuse([tmp_path / "vision.pt"], tmp_path / "vision.pt")
    convert([tmp_path / "vision.pt"], tmp_path / "empty")  # as mktemp -d makes them
    with pytest.raises(ConversionError, match="nothing is overwritten"):
        to_micro_omni(tmp_path / "empty", tmp_path / "vision.pt")


def test_what_cannot_be_written_leaves_nothing(
    micro_omni: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after half of it."""
    torch.save(vision(micro_omni), tmp_path / "vision.pt")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("omni.exchange.micro_omni.incoming.save_kept", full)
    assert "No space left on device" in refuse([tmp_path / "vision.pt"], tmp_path / "ours")


def test_their_files_are_files_of_torch_save(micro_omni: Any, tmp_path: Path) -> None:
    torch.save(vision(micro_omni), tmp_path / "vision.pt")
    convert([tmp_path / "vision.pt"], tmp_path / "ours")
    to_micro_omni(tmp_path / "ours", tmp_path / "back")
    assert sorted(os.listdir(tmp_path / "back")) == ["config.json", "vision.pt"]
    assert zipfile.is_zipfile(tmp_path / "back/vision.pt")

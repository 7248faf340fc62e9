"""An exported folder computes what the model does, where neither torch nor transformers are."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from omni import OmniImageProcessor, OmniVisionConfig, OmniVisionModel
from omni.cli.app import app
from omni.exchange.onnx import ExportError, export
from omni.fusion.signature import CACHE
from omni.loading.checkpoint import load
from omni.questions import make_prompts
from omni.session import answer
from omni.vision.pictures import read_picture

pytest.importorskip("transformers", minversion="5.23")  # as export says itself
Pair = Callable[..., tuple[Any, Any]]
QUESTION = "what shape is it"
EXAMPLE = """
import runpy, sys
sys.argv = ["ask_without_torch.py", *sys.argv[1:]]
found = runpy.run_path("examples/ask_without_torch.py", run_name="__main__")
assert not {"torch", "transformers", "omni"} & set(sys.modules)
import numpy
numpy.savez(sys.argv[1] + ".npz", read=found["mask"].shape[1], logits=found["read"]["logits"],
            **{name: found[name] for name in ("pixels", "tokens", "answer")})
"""


def ask_without_torch(folder: Path, picture: Path, question: str) -> tuple[str, dict[str, np.ndarray]]:
    """What the example prints, and what it computed."""
    done = subprocess.run([sys.executable, "-c", EXAMPLE, folder, picture, question], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), dict(np.load(f"{folder}.npz"))


def save(pair: tuple[Any, Any], folder: Path) -> Path:
    for part in pair:
        part.save_pretrained(folder)
    return folder


def check(checkpoint: Path, exported: Path, picture: Path) -> None:
    """The example's every number is the model's."""
    said, found = ask_without_torch(exported, picture, QUESTION)
    model, processor = load(checkpoint)
    opened = read_picture(picture)
    expected = answer(model, processor, [opened], QUESTION, max_new_tokens=64)
    assert said.split() == expected.answer.split()  # random words may hold characters that a pipe changes
    assert len(found["answer"]) == expected.tokens_written
    inputs = make_prompts(processor, [(QUESTION, [opened])])
    np.testing.assert_allclose(found["pixels"], inputs["pixel_values"].numpy(), atol=1e-6)
    with torch.no_grad():
        tokens = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        ids = torch.cat([inputs["input_ids"], torch.tensor(found["answer"][None, :-1])], dim=1)
        assert ids.shape[1] == found["read"]  # the last word that was written has not been read
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
    logits[:, processor.image_token_id] = -torch.inf
    np.testing.assert_allclose(found["tokens"][0], tokens.numpy(), atol=1e-4)
    np.testing.assert_allclose(found["logits"][:, -1], logits.numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "checkpoint"
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    OmniVisionModel(OmniVisionConfig(**sizes)).save_pretrained(folder)
    OmniImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_a_fused_model_answers_without_torch(make_pair: Pair, picture: Path, tmp_path: Path) -> None:
    checkpoint = save(
        make_pair(text={"num_hidden_layers": 1}, projector="unshuffle_mlp", factor=2), tmp_path / "checkpoint"
    )
    made = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "out"), "--json"])
    assert made.exit_code == 0, made.stderr
    graphs = {graph["file"]: graph for graph in json.loads(made.stdout)["graphs"]}
    assert list(graphs) == ["image_encoder.onnx", "image_projector.onnx", "embedding.onnx", "thinker.onnx"]
    assert graphs["image_encoder.onnx"]["outputs"] == {"cls": ["pictures", 1, 24], "grid": ["pictures", 4, 24]}
    assert graphs["image_projector.onnx"]["outputs"] == {"tokens": ["pictures", 2, 32]}
    assert {*graphs["thinker.onnx"]["inputs"]["attention_mask"]} <= {"rows", "past + tokens", "tokens + past"}
    assert graphs["thinker.onnx"]["inputs"][f"input.{CACHE}.layers.0.keys"] == ["rows", 1, "past", 16]
    assert all(0 <= graph["difference"] <= 1e-4 for graph in graphs.values())
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    check(checkpoint, tmp_path / "out", picture)
    # and transformers reads it back as one of its own exports
    from transformers.exporters import ExportedModel

    assert list(ExportedModel.from_pretrained(tmp_path / "out").components) == [name[:-5] for name in graphs]


def test_an_encoder_alone(encoder: Path, tmp_path: Path) -> None:
    made = export(encoder, tmp_path / "out")
    assert [graph.file for graph in made.graphs] == ["image_encoder.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out/image_encoder.onnx")
    model = OmniVisionModel.from_pretrained(encoder).eval()
    for count in (1, 2, 5):
        pixel_values = torch.randn(count, 3, 16, 16)
        with torch.no_grad():
            expected = model(pixel_values)
        cls, grid = session.run(["cls", "grid"], {"pixel_values": pixel_values.numpy()})
        np.testing.assert_allclose(cls, expected.cls.numpy(), atol=1e-4)
        np.testing.assert_allclose(grid, expected.grid.numpy(), atol=1e-4)
    told = json.loads((tmp_path / "out/omni.json").read_text())
    assert told == {"pixels": {"size": [16, 16], "resample": 2, "scale": [2 / 255] * 3, "shift": [-1.0] * 3}}
    assert (tmp_path / "out/preprocessor_config.json").is_file()


def test_what_differs_from_the_model_is_not_left_behind(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"differ from the model by more than -1 \(image_encoder by .*nothing is written"
    ):
        export(encoder, tmp_path / "deep/out", tolerance=-1)
    assert list((tmp_path / "deep").iterdir()) == []


def test_mistakes_are_one_sentence(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["export", *map(str, arguments)])
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
        return result.stderr

    assert "exists already" in refuse(encoder, tmp_path)
    assert "has no config.json" in refuse(tmp_path, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'omni-thinker[onnx]'" in refuse(encoder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("tower", "thinker"),
    [("clip_vision_model", "llama"), ("siglip_vision_model", "gemma2"), ("dinov2", "gpt2"), ("vit", "gemma3_text")],
)
def test_other_towers_and_thinkers(make_pair: Pair, picture: Path, tmp_path: Path, tower: str, thinker: str) -> None:
    checkpoint = save(make_pair(thinker, tower=tower, output="grid"), tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "out")
    check(checkpoint, tmp_path / "out", picture)


@pytest.mark.long
def test_the_shipped_model(tmp_path: Path) -> None:
    export("checkpoints/omni_tiny", tmp_path / "out")
    assert ask_without_torch(tmp_path / "out", Path("examples/scene.png"), "what color is the circle")[0] == "red"

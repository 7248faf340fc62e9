"""The three commands that README.md shows for pictures of your own, on a folder made by hand."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from omni.cli.app import app

README = Path("README.md").read_text(encoding="utf-8")
FEW = ["arguments.max_steps=2", "arguments.per_device_train_batch_size=2", "arguments.logging_steps=1"]
FEW += ["arguments.dataloader_num_workers=0"]


def commands() -> list[list[str]]:
    block = next(
        block for block in re.findall(r"^```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE) if "birds" in block
    )
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Two drawings of each of two kinds to train on, and one of each to ask about; with and without metadata.jsonl."""
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        rows = []
        for name, color in (("wren", "brown"), ("robin", "red")):
            for number in numbers:
                picture = Image.new("RGB", (80 + 10 * number, 64), "white")
                ImageDraw.Draw(picture).ellipse((10, 10, 50, 50 + number), fill=color)
                (tmp_path / "birds" / split).mkdir(parents=True, exist_ok=True)
                picture.save(tmp_path / "birds" / split / f"{name}{number}.jpg")
                rows.append({"file_name": f"{name}{number}.jpg", "caption": f"a {name}"})
        (tmp_path / "birds" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_check_train_and_ask(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checking, training, evaluating = commands()
    root = Path.cwd()
    training = [str(root / word) if word.startswith("configs/") else word for word in training]
    extra = [f"model.checkpoint={root / 'checkpoints' / 'omni_tiny'}", *FEW]
    training += [word for setting in extra for word in ("--set", setting)]
    monkeypatch.chdir(birds)
    outputs = []
    for arguments in (checking, training, evaluating):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0] == "6 rows (4 of train and 2 of test), 6 pictures, nothing found\n"
    assert outputs[1].splitlines()[-1] == "runs/birds"
    assert (birds / "runs" / "birds" / "run" / "curves.png").is_file()
    assert re.search(r"answer\W+2\b", outputs[2])


def test_trouble_is_told_before_training(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(birds)
    train, test = birds / "birds" / "train", birds / "birds" / "test"
    (test / "robin2.jpg").write_bytes((train / "robin0.jpg").read_bytes())
    (train / "wren1.jpg").write_bytes((train / "wren1.jpg").read_bytes()[:400])
    result = CliRunner().invoke(app, commands()[0], catch_exceptions=False)
    assert result.exit_code == 1
    assert "wren1.jpg" in result.stdout
    assert "robin2.jpg" in result.stdout
    assert "robin0.jpg" in result.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.path=birds/trian"], "'birds/trian' does not exist"),
        (["train.path=birds/train", "train.root=birds/test"], "the picture 'birds/test/wren0.jpg' does not exist"),
        (["train.path=empty.jsonl"], "has 0 rows, expected at least one"),
        (
            ["train.path=birds/train", 'freeze=["tower", "encoder_of_pictures"]'],
            "match no parameter: ['encoder_of_pictures']",
        ),
    ],
)
def test_a_wrong_setting_is_a_sentence(
    birds: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], message: str
) -> None:
    root = Path.cwd()
    monkeypatch.chdir(birds)
    (birds / "empty.jsonl").write_text("")
    settings = [*settings, "evaluate=null", f"model.checkpoint={root / 'checkpoints' / 'omni_tiny'}", *FEW]
    arguments = ["train", str(root / "configs/train_pictures.json")]
    result = CliRunner().invoke(
        app, [*arguments, *(word for setting in settings for word in ("--set", setting))], catch_exceptions=False
    )
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")

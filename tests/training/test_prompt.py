"""The question that a model was trained with goes with it, and is what it is asked where nobody asks anything else."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from omni import OmniProcessor
from omni.cli.app import app
from omni.evaluation import choose_settings
from omni.training.recipe import Recipe
from omni.training.run import run

CONFIGS = Path(__file__).parents[2] / "configs"
PROMPT = "how bright is it"


def train(name: str, small: Path, output: Path, data: dict[str, Any]) -> Path:
    """One step of a shipped recipe."""
    settings: dict[str, Any] = json.loads((CONFIGS / f"train_{name}.json").read_text())
    settings |= {"model": {"checkpoint": str(small / "omni")}, "train": data, "evaluate": None, "output": str(output)}
    settings["arguments"] = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True}
    settings["arguments"] |= {"report_to": "none"}
    return run(Recipe.model_validate(settings))


@pytest.mark.parametrize("name", ["pictures", "lora"])
def test_the_question_of_training_is_the_default(name: str, small: Path, pictures: Path, tmp_path: Path) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    folder = train(name, small, tmp_path / "out", {"path": str(pictures), "prompt": PROMPT})
    OmniProcessor.from_pretrained(folder).save_pretrained(folder)  # it survives being saved again
    picture = str(pictures / "dark" / "0.png")
    asked = ["--checkpoint", str(folder), "--max-new-tokens", "2", "--json"]
    for pictures_given in ([picture], [picture, picture]):
        ended = CliRunner().invoke(app, ["ask", *pictures_given, *asked])
        assert json.loads(ended.stdout)["question"] == PROMPT, ended.output
    ended = CliRunner().invoke(app, ["ask", picture, "what is it", *asked])
    assert json.loads(ended.stdout)["question"] == "what is it"
    assert choose_settings(folder, data=str(pictures)).prompt == PROMPT  # type: ignore[union-attr]
    assert choose_settings(folder, data=str(pictures), prompt="?").prompt == "?"  # type: ignore[union-attr]


def test_a_model_of_many_questions_has_no_default(small: Path, pictures: Path, tmp_path: Path) -> None:
    rows = [{"image": str(pictures / "dark" / "0.png"), "question": f"is it {i}", "answer": "no"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train("pictures", small, tmp_path / "first", {"path": str(pictures)})
    assert OmniProcessor.from_pretrained(tmp_path / "first").prompt == "Describe the picture."
    for name, data in (("rows", {"path": str(tmp_path / "rows.jsonl")}), ("scenes", {"count": 4})):
        folder = train("pictures", small, tmp_path / name, data)
        assert OmniProcessor.from_pretrained(folder).prompt is None
        asked = ["--checkpoint", str(folder)]
        ended = CliRunner().invoke(app, ["ask", rows[0]["image"], rows[0]["image"], *asked])
        assert ended.exit_code == 2
        assert "add the question" in ended.stderr


def test_a_model_whose_items_ask_says_so(small: Path, pictures: Path, tmp_path: Path) -> None:
    picture = str(pictures / "dark" / "0.png")
    for name, questions, expected in (("some", ["is it dark", ""], ["image"]), ("none", ["is it dark", "so"], [])):
        rows = [{"image": picture, "question": question, "answer": "yes"} for question in questions]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder = train("pictures", small, tmp_path / name, {"path": str(tmp_path / f"{name}.jsonl")})
        assert OmniProcessor.from_pretrained(folder).asked_by == expected
    asked = ["ask", picture, "--max-new-tokens", "2", "--checkpoint"]
    assert CliRunner().invoke(app, [*asked, str(tmp_path / "some")]).exit_code == 0
    assert CliRunner().invoke(app, [*asked, str(tmp_path / "none")]).exit_code == 2

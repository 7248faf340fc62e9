"""A world is found by its name, and a missing one is reported in one sentence everywhere."""

import json
from pathlib import Path

import pytest

from omni import worlds
from omni.evaluation import EncoderSettings, Hashes, Result, choose_settings, evaluate
from omni.scenes.evaluation import SceneSettings
from omni.scenes.recipe import Scenes
from omni.training.recipe import Recipe, RecipeError

CONFIGS = Path(__file__).parents[1] / "configs"
MISSING = "The pictures of scenes come from omni.nowhere, which is not installed; install it, or name data of your own."


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worlds._declared, "scenes", "omni.nowhere.world:scenes")


def test_scenes_are_a_world_that_is_found() -> None:
    found = worlds.find_world()
    assert found is worlds.find_world("scenes")
    assert (found.data, found.settings) == (Scenes, SceneSettings)
    assert "scenes" in worlds.worlds()


def test_a_world_that_nobody_declared_is_unknown() -> None:
    with pytest.raises(worlds.WorldError, match="Unknown world 'chess'; known: scenes"):
        worlds.find_world("chess")


def test_a_world_that_lacks_something_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is installed, so nobody is told to install it."""
    (tmp_path / "chess_world.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(worlds._declared, "chess", "chess_world:chess")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"):
        worlds.find_world("chess")
    monkeypatch.setitem(worlds._declared, "chess", "no_such_package.worlds.plugin:chess")
    with pytest.raises(worlds.WorldError, match="The pictures of chess come from no_such_package, which is not inst"):
        worlds.find_world("chess")


@pytest.mark.usefixtures("missing")
def test_whoever_asks_for_a_world_that_is_not_installed_is_told() -> None:
    for ask in (
        lambda: choose_settings("checkpoints/omni_tiny", pictures=2),
        lambda: evaluate("checkpoints/vision_tiny", EncoderSettings(kinds=("shape", "digit"))),
    ):
        with pytest.raises(worlds.WorldError) as error:
            ask()
        assert str(error.value) == MISSING
    with pytest.raises(RecipeError) as error:
        Recipe.read(CONFIGS / "train_vision_tiny.json")
    assert str(error.value) == f"The recipe '{CONFIGS}/train_vision_tiny.json' cannot be followed: {MISSING}"


def test_a_result_about_a_world_that_is_not_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a result all the same."""
    hashes = Hashes(**dict.fromkeys(Hashes.model_fields, "0" * 64))
    about = {"date": "", "seconds": 1, "versions": {}, "device": "cpu", "stopped": 0, "scores": []}
    result = Result(checkpoint="mine", settings=SceneSettings(pictures=3, kinds=("color",)), hashes=hashes, **about)
    result.write(path := tmp_path / "result.json")
    assert json.loads(path.read_text())["settings"]["about"] == "scenes"
    assert Result.read(path) == result
    monkeypatch.setitem(worlds._declared, "scenes", "omni.nowhere.world:scenes")
    with pytest.raises(worlds.WorldError, match="come from omni.nowhere, which is not installed"):
        Result.read(path)


@pytest.mark.usefixtures("missing")
def test_what_names_no_world_needs_none() -> None:
    assert choose_settings("checkpoints/omni_tiny", data="mine.jsonl").about == "manifest"  # type: ignore[union-attr]
    assert choose_settings("checkpoints/vision_tiny").about == "encoder"  # type: ignore[union-attr]
    read = Recipe.read(CONFIGS / "train_pictures.json")
    assert read.model_dump()["train"]["path"]

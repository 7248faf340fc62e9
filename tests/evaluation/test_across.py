"""Retrieval across groups of pictures agrees with plain loops, and copies are searched among all pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni import scenes
from omni.evaluation import EvaluationError, PictureSettings, Result, choose_settings, evaluate, render
from omni.evaluation.across import COPIES, Labelled, nearest_in
from omni.evaluation.picture_sets import SEED
from omni.evaluation.probing import features_of
from omni.loading.encoder import Encoder, load_encoder

from ..conftest import invoke

GROUPS = ("ada", "bob", "eve")
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(labels=n)`: one picture of each label in each group. Its kind is "even" or "odd"."""

    def make(labels: int = 6, groups: tuple[str, ...] = GROUPS, kinds: bool = True) -> Path:
        rows = []
        for group in groups:
            (tmp_path / group).mkdir(exist_ok=True)
            for number in range(labels):
                name = f"{group}/{number}.png"
                scene = scenes.sample_scene(number, "test") if group != "eve" else scenes.sample_scene(900 + number)
                scenes.render(scene).resize((96, 96 if group == "ada" else 80)).save(tmp_path / name)
                kind = {"kind": ("even", "odd")[number % 2]} if kinds else {}
                rows.append({"file_name": name, "text": f"thing {number}", **kind})
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return make


def by_hand(folder: Path, encoder: Encoder) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The rows with their groups, and their centred CLS vectors of length 1."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
    cls = features_of(encoder.encode(encoder.prepare(pictures)))["cls"].astype(float)
    cls -= cls.mean(0)
    return [row | {"group": row["file_name"].split("/")[0]} for row in rows], cls / np.linalg.norm(cls, axis=1)[:, None]


def test_it_is_what_a_loop_finds(make: Make, vision: Path) -> None:
    folder = make()
    result = evaluate(vision, PictureSettings(data=str(folder), queries=("eve",), pictures=4)).result
    for name, encoder in (("", load_encoder(vision)), (", untrained", load_encoder(vision).untrained(SEED))):
        rows, unit = by_hand(folder, encoder)
        hits: dict[int, int] = {1: 0, 5: 0}
        alike = 0
        for i, row in enumerate(rows):
            if row["group"] != "eve":
                continue
            others = [j for j, other in enumerate(rows) if other["group"] != "eve"]
            near = sorted(others, key=lambda j: -float(unit[i] @ unit[j]))
            for k in hits:
                hits[k] += row["text"] in [rows[j]["text"] for j in near[:k]]
            stranger = next(j for j in near if rows[j]["text"] != row["text"])
            alike += rows[stranger]["kind"] == row["kind"]
        for k, right in hits.items():
            score = result.score(f"same label{name} / recall@{k} / cls")
            assert score.n == 6
            assert score.accuracy == pytest.approx(right / 6)
        assert result.score(f"kind{name} / nearest / cls").accuracy == pytest.approx(alike / 6)


def test_each_group_asks_all_others_by_default(make: Make, vision: Path) -> None:
    folder = make(groups=("ada", "bob"), kinds=False)  # bob's pictures are ada's in another shape
    outcome = evaluate(vision, PictureSettings(data=str(folder), pictures=3))
    score = outcome.result.score("same label / recall@1 / cls")
    assert (score.n, score.accuracy) == (12, 1.0)
    assert not any(each.kind.startswith("kind") for each in outcome.result.scores)
    assert outcome.result.score("same label, pixels / recall@1 / pixels").accuracy == 1.0
    assert outcome.items(7)["image"][0].size == (96, 80)
    assert evaluate(vision, PictureSettings(data=str(folder), pictures=3)).result.hashes == outcome.result.hashes


def test_copies_are_found_among_all(make: Make, vision: Path) -> None:
    outcome = evaluate(vision, PictureSettings(data=str(make(labels=5, groups=("ada",))), pictures=4))
    kinds = {each.kind for each in outcome.result.scores}
    assert kinds == {
        f"near-duplicate, {copy}{baseline} / recall@1 / {output}"
        for copy in COPIES
        for baseline, outputs in (("", "cls grid"), (", untrained", "cls grid"), (", pixels", "pixels"))
        for output in outputs.split()
    }  # one group has no others to search in
    for copy in ("JPEG 30", "scale 30 %"):
        score = outcome.result.score(f"near-duplicate, {copy}, pixels / recall@1 / pixels")
        assert (score.n, score.accuracy, score.constant) == (4, 1.0, 1 / 5)


def test_copies_alone_need_no_labels(make: Make, vision: Path) -> None:
    folder = make(labels=3, groups=("ada",))
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"ada/{n}.png"}) + "\n" for n in range(3)))
    settings = choose_settings(vision, data=str(folder), kinds=("near-duplicate",), pictures=2)
    assert {each.n for each in evaluate(vision, settings).result.scores} == {2}
    with pytest.raises(EvaluationError, match="--kind of 'pictures': Input should be 'same label', 'kind' or"):
        choose_settings(vision, data=str(folder), kinds=("same",))


def test_copies_are_what_they_say() -> None:
    picture = scenes.render(scenes.sample_scene(3))
    assert COPIES["scale 30 %"](picture, 0).size == (67, 67)
    cut = COPIES["crop 90 %"](picture, 0)
    assert cut.size == (202, 202)
    assert COPIES["crop 90 %"](picture, 0).tobytes() == cut.tobytes() != COPIES["crop 90 %"](picture, 1).tobytes()
    coarse = np.asarray(COPIES["JPEG 30"](picture, 0), float)
    assert 0.5 < np.abs(coarse - np.asarray(picture, float)).mean() < 30


def test_fewer_neighbours_than_asked_for_are_none() -> None:
    features = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    found = nearest_in(features[:1], features, 5, lambda i: np.array([False, True, False, True]))
    assert sorted(found[0].tolist()) == [-1, -1, -1, 1, 3]
    assert set(found[0, :2]) == {1, 3}
    same = np.ones((5, 3), np.float32)  # an encoder that makes the same of everything finds nothing
    found = nearest_in(same, same, 1, lambda i: np.ones(5, bool), range(5))
    assert not (found[:, 0] == np.arange(5)).any()


def test_what_cannot_be_searched_is_refused(make: Make, vision: Path) -> None:
    folder = make()
    with pytest.raises(EvaluationError, match="lies in a folder 'zoe'; its groups are ada, bob, eve"):
        Labelled(PictureSettings(data=str(folder), queries=("zoe",)))
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    alone = json.dumps(json.loads(rows[0]) | {"text": "only here"})
    (folder / "metadata.jsonl").write_text("\n".join([alone, *rows]) + "\n")
    with pytest.raises(EvaluationError, match=r"no other group has a picture of 'only here'.*leave the row out"):
        Labelled(PictureSettings(data=str(folder)))
    assert len(Labelled(PictureSettings(data=str(folder), queries=("bob",)))) == 19  # it does not ask
    two = json.dumps({"image": ["ada/0.png", "bob/0.png"], "text": "both"})
    (folder / "metadata.jsonl").write_text(two + "\n")
    with pytest.raises(EvaluationError, match="has 2 pictures; an encoder is measured on rows with one"):
        Labelled(PictureSettings(data=str(folder)))
    with pytest.raises(EvaluationError, match="'pictures', which does not take --split; it takes --batch-size, --data"):
        choose_settings(vision, data=str(folder), split="test")


def test_the_command_measures_and_verifies(make: Make, vision: Path, tmp_path: Path) -> None:
    folder, written = make(), tmp_path / "result.json"
    arguments = ["--data", str(folder), "--query", "eve", "--pictures", "2"]
    done = invoke("evaluate", vision, *arguments, "--output", written)
    assert done.exit_code == 0, done.stderr
    result = Result.read(written)
    assert isinstance(result.settings, PictureSettings)
    assert result.settings.queries == ("eve",)
    assert str(folder) in str(render(result).title)
    again = invoke("evaluate", "--verify", written)
    assert (again.exit_code, again.stdout) == (0, "Measured again, all hashes and scores are the same\n")

"""Questions about scenes are the same every time, and their hash is that of what is shown and expected."""

import pytest

from omni import scenes
from omni.evaluation import Asked, EvaluationError
from omni.evaluation.scores import Evaluation
from omni.scenes.evaluation import SceneQuestions, SceneSettings


def test_one_question_of_every_kind_about_every_scene() -> None:
    questions = SceneQuestions("test", 5, 100)
    assert len(questions) == 5
    item = questions[3]
    scene = scenes.sample_scene(103, "test")
    assert item.source == "scene 103 of test"
    assert item.items["image"][0].tobytes() == scenes.render(scene).tobytes()
    expected = scenes.questions(scene, 103, weights=dict.fromkeys(scenes.WORDINGS, 1.0))
    assert [(q.kind, q.text, q.expected) for q in item.queries] == [(q.kind, q.text, q.answer) for q in expected]


def test_the_data_hash_is_that_of_pictures_and_answers() -> None:
    first = SceneQuestions("test", 4, 0).data_hash()
    assert SceneQuestions("test", 4, 0).data_hash() == first
    assert SceneQuestions("test", 4, 0, "held_out").data_hash() == first  # the same in other words
    others = [("test", 3, 0), ("test", 4, 1), ("pairs", 4, 0)]
    assert first not in {SceneQuestions(*arguments).data_hash() for arguments in others}
    assert SceneQuestions("test", 4, 0, kinds=["color"]).data_hash() != first


def test_captions_are_scored_object_by_object_as_well() -> None:
    scene = scenes.sample_scene(3, "test", min_objects=3, max_objects=3)
    whole = scenes.caption(scene)
    one_wrong = whole.replace(f"{scene.objects[0].color} {scene.objects[0].shape}", "plaid circle", 1)
    found = Evaluation.of([Asked("caption", "?", whole, one_wrong)], parts=SceneQuestions.parts)
    assert found.score("caption").accuracy == 0.0
    objects = found.score("caption_objects")
    assert (objects.n, objects.accuracy) == (3, pytest.approx(2 / 3))
    assert found.overall().n == 1


def test_settings_ask_what_they_say() -> None:
    settings = SceneSettings(pictures=3, first=20, split="pairs", wordings="held_out", kinds=("color", "shape"))
    assert settings.title == "3 pictures of pairs, held_out wordings"
    mine, expected = settings.questionnaire(), SceneQuestions("pairs", 3, 20, "held_out", ("color", "shape"))
    assert [mine[index].queries for index in range(3)] == [expected[index].queries for index in range(3)]


def test_swapped_pictures_are_none_of_those_asked_about() -> None:
    questions = SceneQuestions("test", 20, 0)
    real = {questions[index].items["image"][0].tobytes() for index in range(20)}
    assert questions.why_not_swapped("image") is None
    assert real.isdisjoint(questions.swapped(index, "image")[0].tobytes() for index in range(20))


def test_unknown_kinds_and_kinds_that_no_scene_allows() -> None:
    with pytest.raises(EvaluationError, match=r"Unknown kinds of questions \['colour'\]; known: shape, color"):
        SceneQuestions("test", 1, 0, kinds=["colour"])
    alone = next(seed for seed in range(100) if len(scenes.sample_scene(seed, "test").objects) == 1)
    with pytest.raises(
        EvaluationError, match="None of the 1 scenes allows a question of the kinds bigger; ask about mo"
    ):
        SceneQuestions("test", 1, alone, kinds=["bigger"])

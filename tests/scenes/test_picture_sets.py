"""What encoders are asked about scenes is true, and a scene drawn again is the same only in what it shows."""

import numpy as np

from omni import scenes
from omni.evaluation import EncoderSettings
from omni.scenes.picture_sets import (
    OBJECT_TASKS,
    SCENE_TASKS,
    TASKS,
    different_scenes,
    draw_again,
    drawn_twice,
    picture_sets,
)

SMALL = EncoderSettings(pictures=20, fit_pictures=100)


def test_scenes_are_held_out_and_their_labels_are_true() -> None:
    several, single = picture_sets(SMALL)
    assert (len(several.fit), len(several.ask)) == (100, 20)
    assert set(several.fit).isdisjoint(several.ask)
    assert set(several.labels) == set(SCENE_TASKS)
    assert set(single.labels) == set(OBJECT_TASKS)
    scene = scenes.sample_scene(110, "test")
    answers = {
        question.kind: question.answer
        for question in scenes.questions(scene, 110, weights=dict.fromkeys(scenes.WORDINGS, 1))
    }
    assert several.labels["background"][110] == answers["background"]
    assert several.labels["dark"][110] == answers["dark"]
    assert scenes.NUMBERS[int(several.labels["count"][110])] == answers["count"]
    assert np.array_equal(np.asarray(several.draw(110)), np.asarray(scenes.render(scene)))
    alone = scenes.sample_scene(7, "test", min_objects=1, max_objects=1)
    words = scenes.caption(alone).split()
    assert [single.labels[task][7] for task in ("size", "pattern", "color", "shape")] == words[1:5]


def test_a_scene_drawn_again_shows_the_same_objects_and_nothing_else_the_same() -> None:
    originals = different_scenes(150, 0)
    assert len({scenes.caption(scene) for scene in originals}) == 150
    kept = 0
    for scene in originals:
        again = draw_again(scene)
        assert scenes.caption(again) == scenes.caption(scene)
        assert again == draw_again(scene)
        assert again.backdrop != scene.backdrop
        kept += again.background == scene.background
        for item, was in zip(again.objects, scene.objects, strict=True):
            low, high = scenes.DIAMETERS[item.size]
            assert low <= item.diameter <= high
            assert [int(x // scenes.CELL) for x in item.center] == [item.column, item.row]
            assert (item.center, item.diameter, item.rgb) != (was.center, was.diameter, was.rgb)
            assert (item.texture is None) == (item.pattern == "solid")
            ends = (again.backdrop.first, again.backdrop.second)
            assert item.outline or all(
                sum((a - b) ** 2 for a, b in zip(item.rgb, end, strict=True)) > 4900 for end in ends
            )
    assert kept < 75  # backgrounds are drawn anew, so about a quarter is of the same kind
    for scene in originals[:5]:
        one, other = (np.asarray(scenes.render(s), dtype=int) for s in (scene, draw_again(scene)))
        assert np.abs(one - other).mean() > 5
        covered = [set(np.unique(scenes.object_map(s))) - {-1} for s in (scene, draw_again(scene))]
        assert covered[0] == covered[1] == set(range(len(scene.objects)))


def test_pictures_drawn_twice_are_scenes_and_their_second_drawings() -> None:
    drawn, originals = drawn_twice(5, 40), different_scenes(5, 40)
    assert drawn.shows == [scenes.caption(scene) for scene in originals]
    assert drawn.sources == [f"scene {scene.seed} drawn again" for scene in originals]
    for place, scene in enumerate(originals):
        assert drawn.draw(place).tobytes() == scenes.render(scene).tobytes()
        assert drawn.draw_again(place).tobytes() == scenes.render(draw_again(scene)).tobytes()


def test_only_wanted_tasks_have_labels() -> None:
    several, single = picture_sets(SMALL.model_copy(update={"kinds": ("shape", "digit")}))
    assert (set(several.labels), set(single.labels)) == (set(), {"shape"})
    assert set(TASKS) == {*SCENE_TASKS, *OBJECT_TASKS}

"""Scenes as training examples and as data of a recipe: always the same, and those that models were trained on."""

import hashlib
import json
from itertools import islice

import pytest

from omni import scenes
from omni.scenes.conversations import SceneCaptions, SceneConversations
from omni.scenes.recipe import Scenes


def test_scenes_become_conversations() -> None:
    drawn = SceneConversations("train", count=3, questions=4)
    assert len(drawn) == 3
    first = drawn[0]
    assert len(first.items["image"]) == 1
    assert len(first.conversations) == 4
    again = SceneConversations("train", count=3, questions=4)[0]
    assert again.conversations == first.conversations
    assert again.items["image"][0].tobytes() == first.items["image"][0].tobytes()


def test_conversations_are_those_that_models_were_trained_on() -> None:
    """A change of this number makes runs incomparable with those before."""
    examples = [SceneConversations("train", 20, 7)[number] for number in range(20)]
    text = json.dumps([[example.conversations, example.unseen] for example in examples])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "8303e82a8d26487b966e82144cf435d334df56c6936b52e56fa203b14d1ddd0d"
    )


def test_scenes_become_captioned_pictures() -> None:
    drawn, scene = SceneCaptions("test", 5, first=30, max_objects=2), scenes.sample_scene(33, "test", max_objects=2)
    picture, caption = drawn[3]
    assert len(drawn) == 5
    assert caption == drawn.caption(3) == scenes.caption(scene)
    assert picture.tobytes() == scenes.render(scene).tobytes()


# --- The data of a recipe ---------------------------------------------------------------------------------------------


def test_a_recipe_asks_for_the_scenes_that_it_names() -> None:
    data = Scenes(split="test", count=4, first=50, max_objects=3, questions=2, kinds={"color": 1.0})
    examples, captions = data.conversations(), data.captions()
    assert len(examples) == len(captions) == 4
    scene = scenes.sample_scene(52, "test", max_objects=3)
    asked = scenes.questions(scene, 52, 2, weights={"color": 1.0})
    assert [chat[-1]["content"][0]["text"] for chat in examples[2].conversations] == [q.answer for q in asked]
    assert captions.caption(2) == scenes.caption(scene)


def test_the_texts_of_a_tokenizer_are_those_of_the_shipped_one() -> None:
    """They do not depend on what else the recipe says."""
    texts = list(islice(Scenes(count=1, split="pairs", max_objects=1).texts(), 2000))
    expected = "c79eb008abbd3fcda5850f6047c38e0bb4523df66448b2d3ee8625f37822efac"
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == expected


def test_characters_are_for_the_objective_that_learns_them() -> None:
    Scenes(count=1, characters=0.5).check("dense")
    for objective in ("answers", "contrastive"):
        Scenes(count=1).check(objective)
        with pytest.raises(ValueError, match="`characters` are for the objective 'dense'; no question or caption"):
            Scenes(count=1, characters=0.5).check(objective)

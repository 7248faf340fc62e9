"""The generator against an independent reading of its own words.

The heart of it is `solve`: it knows nothing of how a question was made. It reads the text, finds the objects that the
text means, and works the answer out from the scene. Every kind and every wording passes through it.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from omni import scenes
from omni.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    KIND_WEIGHTS,
    NEUTRAL,
    NUMBERS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIZES,
    WORDINGS,
    YES_NO_KINDS,
    Question,
    Scene,
    SceneObject,
    caption,
    object_map,
    parse_caption,
    questions,
    render,
    render_with_map,
    sample_scene,
)
from omni.scenes.scene import _sample_rgb

# --- An independent solver --------------------------------------------------------------------------------------------

SIDE = r"(?P<side>(?:to the )?(?:left|right) of|above|below)"
IT, OTHER = r"(?P<it>the (?:(?! and ).)+?)", r"(?P<other>the (?:(?! and )[^,])+)"  # one object each
READINGS: dict[str, tuple[str, ...]] = {
    "shape": (
        rf"(?:what|which) shape (?:is|does) {IT}(?: have)?",
        rf"(?:what is|name|tell me|give) the shape of {IT}",
        rf"(?:tell me what|say which) shape {IT} (?:is|has)",
    ),
    "color": (
        rf"(?:what|which) color (?:is|does) {IT}(?: have)?",
        rf"(?:what is|name|tell me|give) the color of {IT}",
        rf"(?:tell me what|say which) color {IT} (?:is|has)",
    ),
    "size": (
        rf"(?:what|which) size (?:is|does) {IT}(?: have)?",
        rf"how (?:big|large) is {IT}",
        rf"(?:what is|tell me) the size of {IT}",
        rf"is {IT} (?:small, medium or large|large, medium or small)",
        rf"(?:say|tell me) how large {IT} is",
        rf"how large (?:an object|or small) is {IT}",
        rf"how large would you say {IT} is",
        rf"how (?:big|large) does {IT} look",
    ),
    "pattern": (
        rf"(?:what|which) pattern does {IT} have",
        rf"is {IT} (?:solid, striped or dotted|dotted, striped or solid)",
        rf"(?:what is|tell me|name) the pattern of {IT}",
        rf"which pattern is on {IT}",
        rf"(?:tell me what|say which) pattern {IT} has",
    ),
    "where": (
        rf"where is {IT}",
        rf"(?:what is|give) the (?:position|location) of {IT}",
        rf"where in the picture is {IT}",
        rf"in which place is {IT}",
        rf"what place is {IT} in",
        rf"where (?:in the picture )?(?:do you see|can you find) {IT}",
        rf"tell me where {IT} is",
    ),
    "count": (
        r"how many objects (?:are there|are in the picture|(?:do|can) you see|does the picture (?:show|contain))",
        r"how many shapes are there",
        r"how many things are in the picture",
        r"tell me how many objects there are",
        r"count the objects",
        r"(?:what is|give|tell me) the number of objects",
    ),
    "count_kind": (
        r"how many (?P<kind>.+ objects|(?!objects|shapes|things).+) "
        r"(?:are there|are in the picture|(?:do|can) you see|does the picture show)",
        r"(?:count the|(?:what is|give|tell me) the number of) (?P<kind>.+ objects|(?!objects).+)",
        r"tell me how many (?P<kind>.+ objects|(?!objects).+) there are",
    ),
    "exists": (
        r"(?:is there|(?:do|can) you see|does the picture (?:show|contain|have)|can you find|tell me if there is) "
        r"an? (?P<kind>(?!.*background).+?)(?: in the picture)?",
        r"is an? (?P<kind>.+) in the picture",
    ),
    "relation": (
        rf"(?:(?:say |tell me )?what is|(?:which|what) object is|name the object) {SIDE} {IT}",
        rf"(?:what do you see|what can you find|which object do you see|tell me which object is) {SIDE} {IT}",
    ),
    "position": (
        rf"(?:is it true that|is|can|(?:do|can) you (?:see|find)|tell me if) {IT}"
        rf"(?: is| be found| be seen| found)? {SIDE} {OTHER}",
    ),
    "bigger": (
        rf"(?:is it true that|is|does|tell me if) {IT}(?: is| have a)? (?:bigger|larger)(?: size)? than {OTHER}",
        rf"is the size of {IT} bigger than that of {OTHER}",
    ),
    "same": (
        rf"(?:do|tell me if) {IT} and {OTHER} (?:have|share) (?:the same|a) (?P<attribute>\w+)",
        rf"is the (?P<attribute>\w+) of {IT} the same as that of {OTHER}",
        rf"(?:is it true that|does) {IT} ha(?:ve|s) the same (?P<attribute>\w+) as {OTHER}",
        rf"has {IT} the same (?P<attribute>\w+) as {OTHER}",
        rf"are {IT} and {OTHER} equal in (?P<attribute>\w+)",
    ),
    "both": (
        rf"(?:tell me )?what (?P<attribute>\w+) (?:do )?{IT} and {OTHER} have",
        rf"(?:what are|name) the (?P<attribute>\w+)s of {IT} and {OTHER}",
        rf"which (?P<attribute>\w+) has {IT} and which has {OTHER}",
        rf"(?:what is|tell me) the (?P<attribute>\w+) of {IT} and of {OTHER}",
        rf"name the (?P<attribute>\w+) of {IT} and that of {OTHER}",
        rf"what (?P<attribute>\w+) is {IT} and what (?P=attribute) is {OTHER}",
        rf"do {IT} and {OTHER} (?:have|share) (?:the same|a) (?P<attribute>\w+), and which",
        rf"is the (?P<attribute>\w+) of {IT} the same as that of {OTHER}, and which",
        rf"has {IT} the same (?P<attribute>\w+) as {OTHER}, and which",
        rf"are {IT} and {OTHER} equal in (?P<attribute>\w+), and in which",
    ),
    "background": (
        r"(?:what|which) kind of background (?:is it|is there|does the picture have)",
        r"what is the background like",
        r"is the background plain, gradient, noisy or checkered",
        r"(?:tell me|name) the kind of background",
        r"describe the background",
        r"tell me what kind of background there is",
    ),
    "dark": (
        r"(?:is the background(?: of the picture)?|tell me if the background is) (?:dark or light|light or dark)",
        r"is it a dark or a light background",
        r"does the picture have a dark or a light background",
        r"does the picture have a background that is light or dark",
    ),
    "caption": (
        r"(?:tell me )?what is in the picture",
        r"describe (?:the picture|what you see|all objects in the picture|the objects)",
        r"what does the picture show",
        r"(?:what do|tell me what) you see|what can you see in the picture",
        r"name all objects in the picture",
    ),
}


def normalize(text: str) -> str:
    return text.lower().rstrip("?.").replace("colour", "color").replace("image", "picture")


def read(text: str) -> tuple[str, dict[str, str]]:
    """The kind of a question and what fills its gaps; fails unless exactly one reading fits."""
    found = [
        (kind, match.groupdict())
        for kind, alternatives in READINGS.items()
        for alternative in alternatives
        if (match := re.fullmatch(alternative, normalize(text)))
    ]
    assert len(found) == 1, f"{text!r} reads as {found}"
    return found[0]


def meant(phrase: str, scene: Scene) -> list[SceneObject]:
    """The objects that a noun phrase fits: "the large red circle", "blue stars", "the object at the top left"."""
    if place := re.fullmatch(r"the object (?:at|in) the (.+)", phrase):
        return [item for item in scene.objects if item.place == PLACES.index(place[1])]
    *adjectives, noun = phrase.removeprefix("the ").split()
    noun = {"crosses": "cross"}.get(noun, noun.removesuffix("s") if noun != "cross" else noun)
    known = {*SIZES, *PATTERNS, *COLORS}
    assert set(adjectives) <= known, phrase
    assert noun in {*SHAPES, "object"}, phrase
    return [
        item
        for item in scene.objects
        if noun in ("object", item.shape) and set(adjectives) <= {item.size, item.pattern, item.color}
    ]


def the(phrase: str, scene: Scene) -> SceneObject:
    found = meant(phrase, scene)
    assert len(found) == 1, f"{phrase!r} means {len(found)} objects"
    return found[0]


def lies(one: SceneObject, side: str, other: SceneObject) -> bool:
    (x, y), (to_x, to_y) = one.center, other.center
    return {"left": x < to_x - 15, "right": x > to_x + 15, "above": y < to_y - 15, "below": y > to_y + 15}[side]


def in_line(one: SceneObject, other: SceneObject, axis: int) -> bool:
    """In the same row (axis 0) or column (axis 1), by where the objects are rather than by what `place` says."""
    return int(one.center[1 - axis] // (224 / 3)) == int(other.center[1 - axis] // (224 / 3))


def solve(question: Question, scene: Scene) -> str:
    kind, gaps = read(question.text)
    assert kind == question.kind
    side = gaps.get("side", "").removeprefix("to the ").removesuffix(" of")
    match kind:
        case "shape" | "color" | "size" | "pattern":
            item = the(gaps["it"], scene)
            assert getattr(item, kind) not in gaps["it"].split(), "the question tells the answer"
            return str(getattr(item, kind))
        case "where":
            item = the(gaps["it"], scene)
            return PLACES[int(item.center[1] // (224 / 3)) * 3 + int(item.center[0] // (224 / 3))]
        case "count":
            return NUMBERS[len(scene.objects)]
        case "count_kind":
            return NUMBERS[len(meant(gaps["kind"], scene))]
        case "exists":
            return "yes" if meant(gaps["kind"], scene) else "no"
        case "relation":
            item = the(gaps["it"], scene)
            axis = 0 if side in ("left", "right") else 1
            line = [other for other in scene.objects if lies(other, side, item) and in_line(other, item, axis)]
            nearest = min(line, key=lambda other: abs(other.center[axis] - item.center[axis]))
            return f"{nearest.color} {nearest.shape}"
        case "position":
            one, other = the(gaps["it"], scene), the(gaps["other"], scene)
            opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[side]
            assert lies(one, side, other) != lies(one, opposite, other), "neither is on this side of the other"
            return "yes" if lies(one, side, other) else "no"
        case "bigger":
            one, other = the(gaps["it"], scene), the(gaps["other"], scene)
            assert one.size != other.size
            assert not set(SIZES) & {*gaps["it"].split(), *gaps["other"].split()}, "the question tells the answer"
            return "yes" if one.diameter > other.diameter else "no"
        case "same" | "both":
            one, other = the(gaps["it"], scene), the(gaps["other"], scene)
            assert one is not other
            values = {getattr(one, gaps["attribute"]), getattr(other, gaps["attribute"])}
            assert not values & {*gaps["it"].split(), *gaps["other"].split()}, "the question tells the answer"
            if kind == "same":
                return "yes" if len(values) == 1 else "no"
            first, second = getattr(one, gaps["attribute"]), getattr(other, gaps["attribute"])
            plural = {"shape": {"cross": "crosses"}.get(first, f"{first}s")}.get(gaps["attribute"], first)
            return f"both {plural}" if first == second else f"{first} and {second}"
        case "background":
            return scene.background
        case "dark":
            return "dark" if np.asarray(render(dataclasses.replace(scene, objects=()))).mean() < 127 else "light"
        case "caption":
            return ", ".join(
                f"a {item.size} {item.pattern} {item.color} {item.shape} at the {PLACES[item.place]}"
                for item in sorted(scene.objects, key=lambda item: item.place)
            )
    raise AssertionError(kind)


@cache
def asked_about(seed: int, split: str, n: int, wordings: Literal["seen", "held_out"]) -> tuple[Scene, list[Question]]:
    """Drawn once for all tests."""
    scene = sample_scene(seed, split)
    return scene, questions(scene, rng_seed=seed, n=n, wordings=wordings)


@pytest.fixture(scope="module", autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    asked_about.cache_clear()


def ask_many(
    split: str, count: int, n: int = 8, wordings: Literal["seen", "held_out"] = "seen"
) -> Iterator[tuple[Scene, list[Question]]]:
    for seed in range(count):
        yield asked_about(seed, split, n, wordings)


# --- Questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wordings", ["seen", "held_out"])
@pytest.mark.parametrize("split", ["train", "test", "pairs"])
def test_every_answer_is_what_an_independent_solver_finds(split: str, wordings: Literal["seen", "held_out"]) -> None:
    kinds: Counter[str] = Counter()
    for scene, asked in ask_many(split, 300, n=12, wordings=wordings):
        for question in asked:
            assert solve(question, scene) == question.answer, question
            kinds[question.kind] += 1
    assert set(kinds) == set(WORDINGS) == set(KIND_WEIGHTS)
    assert min(kinds.values()) >= 20


@pytest.mark.parametrize("wordings", ["seen", "held_out"])
def test_every_wording_is_used_and_the_two_sets_are_disjoint(wordings: Literal["seen", "held_out"]) -> None:
    texts: dict[str, set[str]] = {kind: set() for kind in WORDINGS}
    for _, asked in ask_many("train", 300, n=12, wordings=wordings):
        for question in asked:
            texts[question.kind].add(normalize(question.text))
    for kind, known in WORDINGS.items():
        assert min(len(known.seen) - 1, len(known.held_out)) >= 1
        mine = known.seen if wordings == "seen" else known.held_out
        others = known.held_out if wordings == "seen" else known.seen
        for template in mine:
            assert any(_fits(template, text) for text in texts[kind]), f"never asked: {template}"
        for template in others:
            assert not any(_fits(template, text) for text in texts[kind]), f"belongs to the other set: {template}"


def _fits(template: str, text: str) -> bool:
    gaps = {"it": "the .+", "other": "the .+", "side": SIDE, "kind": ".+", "attribute": r"\w+"}
    return re.fullmatch(template.format(**gaps), text) is not None


def test_the_two_sets_of_wordings_ask_the_same_things() -> None:
    for seed in range(50):
        scene = sample_scene(seed)
        seen, held_out = (questions(scene, seed, 8, wordings=wordings) for wordings in ("seen", "held_out"))
        assert [(question.kind, question.answer) for question in seen] == [(q.kind, q.answer) for q in held_out]
        assert not {question.text for question in seen} & {question.text for question in held_out}


@pytest.mark.parametrize("split", ["train", "pairs"])
def test_yes_and_no_are_equally_likely(split: str) -> None:
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in YES_NO_KINDS}
    same: dict[tuple[str, str], Counter[str]] = {}
    for _, asked in ask_many(split, 3000):
        for question in asked:
            if question.kind in answers:
                answers[question.kind][question.answer] += 1
    for kind, tally in answers.items():
        assert set(tally) == {"yes", "no"}
        assert tally.total() > 800
        assert 0.47 <= tally["yes"] / tally.total() <= 0.53, (kind, tally)
    for seed in range(2000):
        for question in questions(sample_scene(seed, split), seed, 6, weights={"same": 1.0, "both": 1.0}):
            equal = "yes" if question.answer.split()[0] in ("yes", "both") else "no"
            same.setdefault((question.kind, read(question.text)[1]["attribute"]), Counter())[equal] += 1
    for attribute, tally in same.items():  # or the attribute alone would tell the likelier answer
        assert 0.44 <= tally["yes"] / tally.total() <= 0.56, (attribute, tally)


def test_absent_things_are_near_misses_half_of_the_time() -> None:
    near = far = zero = counts = 0
    for scene, asked in ask_many("train", 2000):
        for question in asked:
            if question.kind == "count_kind":
                counts += 1
                zero += question.answer == "zero"
            words = read(question.text)[1].get("kind", "").split() if question.kind == "exists" else []
            if question.answer == "no" and words and words[0] in COLORS and words[-1] in SHAPES:
                partly = any(words[0] == item.color or words[1] == item.shape for item in scene.objects)
                near, far = near + partly, far + (not partly)
    assert near / (near + far) >= 0.5
    assert far / (near + far) >= 0.15
    assert 0.15 <= zero / counts <= 0.21


def test_questions_of_a_scene_differ_and_are_as_many_as_asked_for() -> None:
    total = 0
    for _, asked in ask_many("train", 300):
        assert len({normalize(question.text) for question in asked}) == len(asked) <= 8
        total += len(asked)
    assert total >= 0.98 * 300 * 8


def test_surface_varies_but_answers_do_not() -> None:
    texts = [question.text for _, asked in ask_many("train", 300) for question in asked]
    answers = {question.answer for _, asked in ask_many("train", 300) for question in asked}
    for sign in (
        str.isupper,
        str.islower,
        lambda text: text.endswith("?"),
        lambda text: text.endswith("."),
        lambda text: "colour" in text,
        lambda text: "color" in text,
        lambda text: "image" in text,
        lambda text: "picture" in text,
    ):
        assert 10 < sum(map(sign, texts)) < 0.8 * len(texts)
    assert all(re.fullmatch(r"[a-z ,]+", answer) for answer in answers)


def test_kinds_can_be_chosen() -> None:
    scene = sample_scene(5, min_objects=6)
    assert {question.kind for question in questions(scene, 0, 6, weights={"color": 1, "where": 2})} == {
        "color",
        "where",
    }
    assert [question.kind for question in questions(scene, 0)] == list(KIND_WEIGHTS)
    with pytest.raises(ValueError, match=r"unknown kinds of questions \['colour'\]; known: shape, color"):
        questions(scene, 0, 3, weights={"colour": 1})


# --- Splits -----------------------------------------------------------------------------------------------------------


def test_ten_held_out_pairs_use_every_shape_and_every_colour_once() -> None:
    assert len(HELD_OUT_PAIRS) == 10
    assert {shape for shape, _ in HELD_OUT_PAIRS} == set(SHAPES)
    assert {color for _, color in HELD_OUT_PAIRS} == set(COLORS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_held_out_pairs_are_neither_drawn_nor_named(split: str) -> None:
    drawn: set[tuple[str, str]] = set()
    named: set[tuple[str, str]] = set()
    for scene, asked in ask_many(split, 1900):
        drawn |= {(item.shape, item.color) for item in scene.objects}
        for question in asked:
            words = re.findall(r"\w+", f"{normalize(question.text)} , {question.answer}")
            named |= {
                (shape, color)
                for color, noun in itertools.pairwise(words)
                for shape in SHAPES
                if color in COLORS and noun in (shape, f"{shape}s", f"{shape}es")
            }
    everything = set(itertools.product(SHAPES, COLORS))
    assert drawn == named == everything - HELD_OUT_PAIRS


def test_pairs_asks_about_held_out_pairs() -> None:
    drawn: set[tuple[str, str]] = set()
    for scene, asked in ask_many("pairs", 600, n=10):
        pairs = {(item.shape, item.color) for item in scene.objects} & HELD_OUT_PAIRS
        assert pairs
        drawn |= pairs
        for question in asked:
            kind, gaps = read(question.text)
            if "kind" in gaps:
                color, shape = gaps["kind"].split()
                assert {(name, color) for name in SHAPES if shape.startswith(name)} <= HELD_OUT_PAIRS
            elif kind == "relation":
                color, shape = question.answer.split()
                assert (shape, color) in HELD_OUT_PAIRS
            elif "it" in gaps:
                items = [the(gaps[name], scene) for name in ("it", "other") if name in gaps]
                assert any((item.shape, item.color) in HELD_OUT_PAIRS for item in items)
    assert drawn == HELD_OUT_PAIRS


def test_splits_share_no_scene() -> None:
    looks = {
        split: {dump([dataclasses.replace(sample_scene(seed, split), seed=0, split="")]) for seed in range(300)}
        for split in scenes.SPLITS
    }
    assert all(len(look) == 300 for look in looks.values())
    for one, other in itertools.combinations(looks.values(), 2):
        assert not one & other


def test_all_of_the_vocabulary_occurs_evenly() -> None:
    sample = [sample_scene(seed) for seed in range(2000)]
    items = [item for scene in sample for item in scene.objects]
    for name, known in {"shape": SHAPES, "color": COLORS, "size": SIZES, "pattern": PATTERNS}.items():
        tally = Counter(getattr(item, name) for item in items)
        assert set(tally) == set(known)
        assert min(tally.values()) > 0.75 * len(items) / len(known)
    assert {item.place for item in items} == set(range(9))
    assert Counter(scene.background for scene in sample).keys() == set(BACKGROUNDS)
    assert set(Counter(len(scene.objects) for scene in sample)) == {1, 2, 3, 4, 5, 6}
    assert 0.45 < sum(scene.dark for scene in sample) / len(sample) < 0.55
    for scene in sample:
        assert [item.place for item in scene.objects] == sorted({item.place for item in scene.objects})


def test_neutral_objects_come_in_every_shape_and_are_not_talked_about() -> None:
    sample = [sample_scene(seed, min_objects=5, max_objects=8, neutral=0.4) for seed in range(200)]
    items = [item for scene in sample for item in scene.objects]
    assert all(5 <= len(scene.objects) <= 8 for scene in sample)
    assert {item.shape for item in items if item.color == NEUTRAL} == set(SHAPES)
    assert 0.35 < sum(item.color == NEUTRAL for item in items) / len(items) < 0.5
    assert not {(item.shape, item.color) for item in items} & HELD_OUT_PAIRS
    spoiled = next(scene for scene in sample if any(item.color == NEUTRAL for item in scene.objects))
    for talk in (caption, lambda scene: questions(scene, 0, 3)):
        with pytest.raises(ValueError, match="objects without a named colour"):
            talk(spoiled)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'valid'; known: train, test, pairs"):
        sample_scene(0, "valid")
    with pytest.raises(ValueError, match="got 3 and 12"):
        sample_scene(0, min_objects=3, max_objects=12)


# --- Determinism ------------------------------------------------------------------------------------------------------


def dump(sample: list[Scene]) -> str:
    """The structure of scenes as text, floats rounded so that another libm's last digit does not matter."""
    rounded = json.loads(
        json.dumps([dataclasses.asdict(scene) for scene in sample]), parse_float=lambda x: round(float(x), 6)
    )
    return json.dumps(rounded, sort_keys=True)


def fingerprint() -> str:
    sample = [sample_scene(seed, split) for split in scenes.SPLITS for seed in range(20)]
    asked = [[q.kind, q.text, q.answer] for scene in sample for q in questions(scene, 1, 8)]
    return hashlib.sha256((dump(sample) + json.dumps(asked)).encode()).hexdigest()


def test_scenes_and_questions_are_those_that_models_were_trained_on() -> None:
    """A change of this number makes all measured scores incomparable: change it knowingly, and measure again."""
    assert fingerprint() == "ef3cfefb9cd280270e1f519a2df1d8c738302e2c5265cfa9ebc64669afb41a3b"


def test_another_process_sees_the_same() -> None:
    program = (
        "import hashlib, numpy\n"
        "from omni.scenes import *\n"
        "scenes = [sample_scene(seed, split, neutral=0.0) for split in ('train', 'pairs') for seed in range(15)]\n"
        "seen = [(repr(s), repr(questions(s, 3, 8)), render(s).tobytes(), object_map(s).tobytes()) for s in scenes]\n"
        "print(hashlib.sha256(repr(seen).encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


def test_needs_nothing_but_numpy_and_pillow() -> None:
    """What the package exports, that is; made-up characters too. Training and evaluation of scenes are other files of it."""
    program = (
        "import sys; from omni import scenes; from omni.scenes import glyphs\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(*sorted(loaded & {'numpy', 'PIL', 'torch', 'transformers', 'pydantic', 'einops'}))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('omni.scenes.')))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packages, own = (line.split() for line in run.stdout.splitlines())
    assert packages == ["PIL", "numpy"]
    parts = ("captions", "drawing", "glyphs", "questions", "scene", "vocabulary", "wordings")
    assert own == [f"omni.scenes.{part}" for part in parts]


# --- Pictures ---------------------------------------------------------------------------------------------------------


def silhouette(scene: Scene, item: SceneObject) -> NDArray[np.float64]:
    """float64[224, 224]: how much of each pixel an object covers, seen by painting it alone, white on black."""
    alone = dataclasses.replace(item, rgb=(255, 255, 255), texture=None, outline=None)
    stage = dataclasses.replace(scene.backdrop, first=(0, 0, 0))
    bare = dataclasses.replace(scene, objects=(alone,), background="plain", backdrop=stage, sensor_noise=0.0)
    cover: NDArray[np.float64] = np.asarray(render(bare)).mean(axis=2) / 255
    return cover


def test_pictures_are_rgb_224_and_the_same_each_time() -> None:
    scene = sample_scene(3)
    picture, patches = render_with_map(scene)
    assert (picture.mode, picture.size) == ("RGB", (224, 224))
    assert picture.tobytes() == render(scene).tobytes()
    assert np.array_equal(patches, object_map(scene))


def test_objects_have_their_size_and_stay_in_their_cell() -> None:
    longest: dict[str, list[int]] = {size: [] for size in SIZES}
    for seed in range(150):
        scene = sample_scene(seed)
        for item in scene.objects:
            rows, columns = np.nonzero(silhouette(scene, item) > 0.5)
            top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
            assert min(top, left, 224 - bottom, 224 - right) > 0, "cut off by the edge of the picture"
            middle = (int((top + bottom) / 2 // (224 / 3)), int((left + right) / 2 // (224 / 3)))
            assert middle == (item.row, item.column)
            spill = max(item.column * 224 / 3 - left, right - (item.column + 1) * 224 / 3)
            assert spill <= (5 if item.size == "large" else 1)
            rows, columns = np.nonzero(silhouette(scene, dataclasses.replace(item, angle=0.0)) > 0.5)
            longest[item.size].append(int(max(np.ptp(rows), np.ptp(columns))) + 1)
    low = {"small": 24, "medium": 38, "large": 56}
    high = {"small": 28, "medium": 44, "large": 64}
    for size, lengths in longest.items():
        assert len(lengths) > 100
        assert 0.85 * low[size] <= min(lengths)
        assert max(lengths) <= high[size] + 2
    assert max(longest["small"]) < min(longest["medium"])
    assert max(longest["medium"]) < min(longest["large"])


def test_object_map_names_what_covers_a_patch() -> None:
    for seed in range(60):
        scene = sample_scene(seed)
        patches = object_map(scene)
        assert patches.shape == (14, 14)
        assert patches.dtype == np.int64
        cover = np.stack([silhouette(scene, item).reshape(14, 16, 14, 16).mean(axis=(1, 3)) for item in scene.objects])
        most = cover.max(axis=0)
        assert np.array_equal(patches[most < 0.145], np.full((most < 0.145).sum(), -1))
        clear = most > 0.155
        assert np.array_equal(patches[clear], cover.argmax(axis=0)[clear])
        assert set(range(len(scene.objects))) <= set(patches.ravel().tolist()), "an object without a patch"


def test_every_object_can_be_seen() -> None:
    """Where an object is, the picture differs from what it would be without the object."""
    for seed in range(150):
        scene = sample_scene(seed)
        picture = np.asarray(render(scene)).astype(int)
        for index, item in enumerate(scene.objects):
            rest = scene.objects[:index] + scene.objects[index + 1 :]
            without = np.asarray(render(dataclasses.replace(scene, objects=rest))).astype(int)
            contrast = np.abs(picture - without).max(axis=2)[silhouette(scene, item) > 0.5]
            # An outline, 2 pixels wide around a black object in front of black, is the least that there is to see.
            assert (contrast > 40).mean() > (0.4 if item.outline is None else 0.12), (seed, item)


def test_colours_cannot_be_mistaken() -> None:
    """The nearest of many samples of any name, by hue and brightness, has the same name."""
    rng = scenes.stream("colours")
    sample = [(color, _sample_rgb(rng, color)) for color in COLORS for _ in range(150)]
    points = np.array([rgb for _, rgb in sample], dtype=float)
    names = np.array([color for color, _ in sample])
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    apart = distance[names[:, None] != names[None]].min()
    assert apart > 25, apart
    np.fill_diagonal(distance, np.inf)
    assert (names[distance.argmin(axis=1)] == names).mean() > 0.995


def test_backgrounds_are_what_they_are_called() -> None:
    seen: Counter[str] = Counter()
    at_the_corner = 0
    for seed in range(250):
        scene = dataclasses.replace(sample_scene(seed), objects=())
        pixels = np.asarray(render(scene)).astype(float)
        colors = pixels.reshape(14, 16, 14, 16, 3).mean(axis=(1, 3))
        blocks = colors.mean(axis=2)
        seen[scene.background] += 1
        assert pixels.mean() < 100 if scene.dark else pixels.mean() > 150
        spread = pixels.std(axis=(0, 1)).max()
        match scene.background:
            case "plain":
                assert spread < 9
                assert np.ptp(blocks) < 5
            case "noisy":
                assert spread > 11
                assert np.ptp(blocks) < 45
            case "gradient":
                assert np.linalg.norm(np.ptp(colors, axis=(0, 1))) > 25  # perhaps between two colours of one brightness
                assert np.abs(np.diff(blocks, axis=0)).max() < 12
            case "checkered":
                still = np.asarray(render(dataclasses.replace(scene, sensor_noise=0.0)))
                colours = still.reshape(-1, 3).astype(int) @ (65536, 256, 1)  # one number each, which sorts quickly
                fields = np.unique(colours)[:, None] // (65536, 256, 1) % 256
                assert len(fields) == 2
                assert np.abs(fields[0] - fields[1]).max() >= 15
                at_the_corner += scene.backdrop.offset == (0, 0)
    assert set(seen) == set(BACKGROUNDS)
    # a model that never saw boards so laid took them for gradients, where each patch of its encoder was one field or less
    assert 0.3 < at_the_corner / seen["checkered"] < 0.7


def test_some_gradients_go_outwards_from_a_point() -> None:
    straight, outwards = 0, list[tuple[float, float]]()
    y, x = np.mgrid[0:224:8, 0:224:8]
    for scene in map(sample_scene, range(600)):
        if scene.background == "gradient":
            still = dataclasses.replace(scene, objects=(), sensor_noise=0.0)
            colors = np.asarray(render(still))[::8, ::8].reshape(-1, 3).astype(float)

            def error(*terms: NDArray[np.float64], colors: NDArray[np.float64] = colors) -> float:
                known = np.stack([np.ones(x.size), *(term.ravel() for term in terms)], axis=1)
                return float(np.abs(known @ np.linalg.lstsq(known, colors)[0] - colors).max())

            if (middle := scene.backdrop.middle) is None:
                straight += 1
                assert error(x.astype(float), y.astype(float)) < 1.5
            else:
                outwards.append(middle)
                assert error(np.hypot(x - middle[0], y - middle[1])) < 1.5 < error(x.astype(float), y.astype(float))
    assert 0.2 < len(outwards) / (straight + len(outwards)) < 0.4
    assert 0.3 < outwards.count((112, 112)) / len(outwards) < 0.7  # the others anywhere


# --- Captions ---------------------------------------------------------------------------------------------------------


def test_captions_can_be_read_back() -> None:
    for seed in range(200):
        scene = sample_scene(seed, "pairs" if seed % 2 else "test")
        assert parse_caption(caption(scene)) == [
            {
                "size": item.size,
                "pattern": item.pattern,
                "color": item.color,
                "shape": item.shape,
                "place": PLACES[item.place],
            }
            for item in scene.objects
        ]


def test_whatever_a_model_says_is_parsed_as_far_as_it_goes() -> None:
    assert parse_caption("") == parse_caption("I do not know!") == parse_caption(",,, a the") == []
    assert parse_caption("A Large RED circle at the bottom left and stars, a ring at the center.") == [
        {"size": "large", "color": "red", "shape": "circle", "place": "bottom left"},
        {"shape": "ring", "place": "center"},
    ]

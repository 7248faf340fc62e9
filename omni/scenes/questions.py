"""Questions about a scene, as people would type them, with certain answers.

Guessing does not pay. For a yes/no question the answer is drawn first, and then a question that has this answer. It is
asked only where the scene allows both answers.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from .captions import caption, require_colors
from .scene import Scene, SceneObject, stream
from .vocabulary import ATTRIBUTES, HELD_OUT_PAIRS, NEVER_SHOWN, NUMBERS, PLACES, SHAPES, SIZES
from .wordings import KIND_WEIGHTS, WORDINGS, WordingSet, vary

_SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (row, column) steps
_KINDS_TO_FIND = {("color", "shape"): 6, ("shape",): 2, ("color",): 2, ("pattern", "shape"): 1, ("size", "shape"): 1}
_KINDS_TO_COUNT = (*_KINDS_TO_FIND, ("size",), ("pattern",))
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in (*SHAPES, "object")}


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: a key of `WORDINGS`.
        text: the question, as a person would type it.
        answer: the answer in lower-case words.
        unseen: for each word of the answer, the word that no picture of the split "train" can have in its place, or "".
            For the colour of a hexagon it is "cyan". Empty in other splits.
    """

    kind: str
    text: str
    answer: str
    unseen: tuple[str, ...] = field(default=(), repr=False)


def questions(
    scene: Scene,
    rng_seed: int,
    n: int | None = None,
    *,
    wordings: WordingSet = "seen",
    weights: Mapping[str, float] = KIND_WEIGHTS,
) -> list[Question]:
    """`n` different questions about a scene, with kinds drawn by `weights`. Without `n`, one of every possible kind.

    A scene with few objects may have fewer than `n` questions. The same seed with other wordings asks the same in other
    words, so that the two scores can be compared question by question.
    """
    require_colors(scene)
    unknown = sorted(set(weights) - set(WORDINGS))
    if unknown:
        raise ValueError(f"unknown kinds of questions {unknown}; known: {', '.join(WORDINGS)}")
    asker = _Asker(scene, stream("questions", scene.split, scene.seed, rng_seed), wordings)
    if n is None:
        asked = (asker.ask(kind) for kind, weight in weights.items() if weight > 0)
        return [question for question in asked if question is not None]
    found: list[Question] = []
    kinds = asker.rng.choices(list(weights), list(weights.values()), k=6 * n)
    for kind in kinds:
        if len(found) == n:
            break
        question = asker.ask(kind)
        if question is not None:
            found.append(question)
    return found


_Draft = tuple[dict[str, str], str, *tuple[str, ...]]
"""The words for the gaps of a wording, the answer, and `Question.unseen`."""


class _Asker:
    """Makes questions about one scene, with one method for each kind. It returns None if the scene allows no such question.

    In the split "pairs" all questions about objects are about objects of a held-out pair.
    """

    def __init__(self, scene: Scene, rng: random.Random, wordings: WordingSet) -> None:
        self.scene = scene
        self.rng = rng
        self.wordings = wordings
        self.about_pairs = scene.split == "pairs"
        self.targets = [thing for thing in scene.objects if thing.held_out or not self.about_pairs]
        self.asked: set[tuple[str, ...]] = set()
        self.wanted: dict[str, bool] = {}  # the answer that a yes/no kind is to have next
        self.unique = _unique_descriptions(scene)

    def ask(self, kind: str) -> Question | None:
        # The answer comes first; a scene without a question that has it gets none. Yes and no take turns, because a scene
        # may have one question with "yes" and many with "no".
        wanted = self.wanted.setdefault(kind, self.rng.random() < 0.5)
        for _ in range(5):
            draft = _ASK[kind](self, wanted)
            if draft is None:
                return None
            gaps, answer, *unseen = draft
            if (kind, *gaps.values()) not in self.asked:
                self.asked.add((kind, *gaps.values()))
                self.wanted[kind] = not wanted
                known = getattr(WORDINGS[kind], self.wordings)
                wording: str = known[int(self.rng.random() * len(known))]
                text = vary(wording.format(**gaps), self.rng)
                return Question(kind, text, answer, tuple(unseen) if self.scene.split == "train" else ())
        return None

    # How objects are named ------------------------------------------------------------------------------------------

    def name(self, thing: SceneObject, *hidden: str) -> str | None:
        """A description that fits only this object, without the hidden attributes or the hidden "place"."""
        allowed = [names for names in self.unique[thing.place] if names.isdisjoint(hidden)]
        if "place" not in hidden and (not allowed or self.rng.random() < 0.25):
            place = PLACES[thing.place]
            inner = 0.5 if place == "center" else 0.2 if " " in place else 0.0  # nobody says "in the left"
            return f"the object {'in' if self.rng.random() < inner else 'at'} the {place}"
        if not allowed:
            return None
        if self.rng.random() < 0.85:  # most of the time, people say no more than is needed
            allowed = [names for names in allowed if not any(other < names for other in allowed)]
        return "the " + _noun_phrase({name: getattr(thing, name) for name in self.rng.choice(allowed)})

    def name_two(self, one: SceneObject, other: SceneObject, *hidden: str) -> dict[str, str] | None:
        it, that = self.name(one, *hidden), self.name(other, *hidden)
        return {"it": it, "other": that} if it and that else None

    def pairs_of_objects(self) -> list[tuple[SceneObject, SceneObject]]:
        """All ordered pairs with a target among them, in random order."""
        pairs = [
            pair
            for pair in itertools.permutations(self.scene.objects, 2)
            if not self.about_pairs or pair[0].held_out or pair[1].held_out
        ]
        self.rng.shuffle(pairs)
        return pairs

    # Attributes and places ------------------------------------------------------------------------------------------

    def attribute(self, name: str) -> _Draft | None:
        thing = self.rng.choice(self.targets)
        it = self.name(thing, name)
        return ({"it": it}, getattr(thing, name), _never_shown(thing, name)) if it else None

    def where(self) -> _Draft | None:
        for thing in self.rng.sample(self.targets, len(self.targets)):
            it = self.name(thing, "place")
            if it:
                return {"it": it}, PLACES[thing.place]
        return None

    # Counts and existence -------------------------------------------------------------------------------------------

    def count_kind(self) -> _Draft | None:
        if self.rng.random() < 0.18:
            absent = self.absent(self.some_attributes())
            return ({"kind": _noun_phrase(absent, plural=True)}, "zero") if absent else None
        found: dict[int, list[dict[str, str]]] = {}
        for names in [("color", "shape")] if self.about_pairs else _KINDS_TO_COUNT:
            tally = Counter(tuple(getattr(thing, name) for name in names) for thing in self.scene.objects)
            for values in dict.fromkeys(tuple(getattr(thing, name) for name in names) for thing in self.targets):
                found.setdefault(tally[values], []).append(dict(zip(names, values, strict=True)))
        count = self.rng.choice(sorted(found))  # the answer first, or nearly every answer would be "one"
        return {"kind": _noun_phrase(self.rng.choice(found[count]), plural=True)}, NUMBERS[count]

    def exists(self, wanted: bool) -> _Draft | None:
        names = self.some_attributes()
        thing = self.rng.choice(self.targets)
        kind = {name: getattr(thing, name) for name in names} if wanted else self.absent(names)
        if kind is None:
            return None
        phrase = _noun_phrase(kind)
        article = "an" if phrase[0] in "aeiou" else "a"
        return {"kind": f"{article} {phrase}"}, "yes" if wanted else "no"

    def some_attributes(self) -> tuple[str, ...]:
        if self.about_pairs:
            return ("color", "shape")
        return self.rng.choices(list(_KINDS_TO_FIND), list(_KINDS_TO_FIND.values()))[0]

    def absent(self, names: tuple[str, ...]) -> dict[str, str] | None:
        """A kind of object that the scene does not have. Half of them differ in one word from an object that it has."""
        hard = len(names) > 1 and self.rng.random() < 0.5
        for _ in range(40):
            kind = {name: self.rng.choice(ATTRIBUTES[name]) for name in names}
            if self.about_pairs:
                kind["shape"], kind["color"] = self.rng.choice(sorted(HELD_OUT_PAIRS))
            elif hard:
                near, kept = self.rng.choice(self.scene.objects), self.rng.choice(names)
                kind[kept] = getattr(near, kept)
            forbidden = not self.about_pairs and (kind.get("shape"), kind.get("color")) in HELD_OUT_PAIRS
            if not forbidden and not any(_matches(thing, kind) for thing in self.scene.objects):
                return kind
        return None

    # Two objects ----------------------------------------------------------------------------------------------------

    def relation(self) -> _Draft | None:
        """Ask which object is next to another in its row or column, with no object between the two."""
        found = [
            (side, thing, neighbour)
            for thing in self.scene.objects
            for side in _SIDES
            if (neighbour := _neighbour(self.scene, thing, side)) in self.targets and neighbour is not None
        ]
        if not found:
            return None
        side, thing, neighbour = self.rng.choice(found)
        it = self.name(thing)
        assert it is not None  # every object can be named by its place
        unseen = (_never_shown(neighbour, name) for name in ("color", "shape"))
        return {"side": self.side(side), "it": it}, f"{neighbour.color} {neighbour.shape}", *unseen

    def position(self, wanted: bool) -> _Draft | None:
        for one, other in self.pairs_of_objects():
            true = [
                side
                for side, (row, column) in _SIDES.items()
                if row * (one.row - other.row) > 0 or column * (one.column - other.column) > 0
            ]
            names = self.name_two(one, other, "place")
            if true and names:
                side = self.rng.choice(true)
                return {"side": self.side(side if wanted else _OPPOSITES[side]), **names}, "yes" if wanted else "no"
        return None

    def side(self, side: str) -> str:
        return f"to the {side}" if side.endswith("of") and self.rng.random() < 0.4 else side

    def bigger(self, wanted: bool) -> _Draft | None:
        for one, other in self.pairs_of_objects():
            order = SIZES.index(one.size) - SIZES.index(other.size)
            if (order > 0) if wanted else (order < 0):
                names = self.name_two(one, other, "size")
                if names:
                    return names, "yes" if wanted else "no"
        return None

    def same(self, wanted: bool) -> _Draft | None:
        found = self.two_with(wanted)
        if found is None:
            return None
        _, _, gaps = found
        return gaps, "yes" if wanted else "no"

    def both(self, wanted: bool) -> _Draft | None:
        """Ask for an attribute of two objects. It teaches the two lookups that "same" needs; without it, "same" is not
        learnt.
        """
        found = self.two_with(wanted)
        if found is None:
            return None
        one, other, gaps = found
        first, second = (getattr(thing, gaps["attribute"]) for thing in (one, other))
        before, after = (_never_shown(thing, gaps["attribute"]) for thing in (one, other))
        if wanted:
            return gaps, f"both {_PLURALS.get(first, first)}", before, _PLURALS.get(after, after)
        return gaps, f"{first} and {second}", before, "", after

    def two_with(self, equal: bool) -> tuple[SceneObject, SceneObject, dict[str, str]] | None:
        """Two objects that share an attribute, or do not. The scene has pairs of both sorts."""
        attribute = self.rng.choice(list(ATTRIBUTES))
        answers: dict[bool, list[tuple[SceneObject, SceneObject]]] = {True: [], False: []}
        for one, other in self.pairs_of_objects():
            answers[getattr(one, attribute) == getattr(other, attribute)].append((one, other))
        if not (answers[True] and answers[False]):  # or "no" would be far more frequent
            return None
        one, other = answers[equal][0]
        names = self.name_two(one, other, attribute)
        assert names is not None  # every object can be named by its place
        return one, other, {"attribute": attribute, **names}


_ASK: dict[str, Callable[[_Asker, bool], _Draft | None]] = {
    "shape": lambda asker, _: asker.attribute("shape"),
    "color": lambda asker, _: asker.attribute("color"),
    "size": lambda asker, _: asker.attribute("size"),
    "pattern": lambda asker, _: asker.attribute("pattern"),
    "where": lambda asker, _: asker.where(),
    "count": lambda asker, _: ({}, NUMBERS[len(asker.scene.objects)]),
    "count_kind": lambda asker, _: asker.count_kind(),
    "exists": lambda asker, wanted: asker.exists(wanted),
    "relation": lambda asker, _: asker.relation(),
    "position": lambda asker, wanted: asker.position(wanted),
    "bigger": lambda asker, wanted: asker.bigger(wanted),
    "same": lambda asker, wanted: asker.same(wanted),
    "both": lambda asker, wanted: asker.both(wanted),
    "background": lambda asker, _: ({}, asker.scene.background),
    "dark": lambda asker, _: ({}, "dark" if asker.scene.dark else "light"),
    "caption": lambda asker, _: ({}, caption(asker.scene), *_never_shown_in_caption(asker.scene)),
}


def _never_shown(thing: SceneObject, attribute: str) -> str:
    """For colour and shape, the value that training never shows together with the other of the two; otherwise ""."""
    return (
        NEVER_SHOWN[{"shape": thing.color, "color": thing.shape}[attribute]] if attribute in ("shape", "color") else ""
    )


def _never_shown_in_caption(scene: Scene) -> Iterator[str]:
    """The same for each word of `caption`."""
    for thing in scene.objects:
        yield from ("", "", "", _never_shown(thing, "color"), _never_shown(thing, "shape"), "", "")
        yield from [""] * len(PLACES[thing.place].split())


def _noun_phrase(attributes: Mapping[str, str], *, plural: bool = False) -> str:
    """A phrase such as "large striped star" or "red objects". Words are in the order of ATTRIBUTES."""
    noun = attributes.get("shape", "object")
    adjectives = [attributes[name] for name in ATTRIBUTES if name in attributes and name != "shape"]
    return " ".join([*adjectives, _PLURALS[noun] if plural else noun])


def _matches(thing: SceneObject, kind: Mapping[str, str]) -> bool:
    return all(getattr(thing, name) == value for name, value in kind.items())


_SUBSETS = [frozenset(names) for k in range(len(ATTRIBUTES) + 1) for names in itertools.combinations(ATTRIBUTES, k)]


def _unique_descriptions(scene: Scene) -> dict[int, list[frozenset[str]]]:
    """For each object, by its place: the sets of attributes that tell it from all other objects."""
    unique: dict[int, list[frozenset[str]]] = {thing.place: [] for thing in scene.objects}
    for names in _SUBSETS:
        values = [tuple(getattr(thing, name) for name in names) for thing in scene.objects]
        tally = Counter(values)
        for thing, value in zip(scene.objects, values, strict=True):
            if tally[value] == 1:
                unique[thing.place].append(names)
    return unique


def _neighbour(scene: Scene, thing: SceneObject, side: str) -> SceneObject | None:
    """The nearest object on one side of `thing` in the same row (left, right) or column (above, below)."""
    by_cell = {(other.row, other.column): other for other in scene.objects}
    down, along = _SIDES[side]
    for steps in (1, 2):
        found = by_cell.get((thing.row + steps * down, thing.column + steps * along))
        if found is not None:
            return found
    return None

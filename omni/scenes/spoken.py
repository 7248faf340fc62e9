"""Sounds as training data: sayings of a corpus (`omni.scenes.corpus`), which sound different each time, and beeps.

`Sayings` are sounds with transcripts. `Heard` are conversations with sounds in them:

| kind | items | asked | answer |
|---|---|---|---|
| typed | a picture | typed questions about it | as in `SceneConversations` |
| spoken | a picture, spoken questions about it | nothing, or to answer the question | as if it were typed |
| two | two pictures, a spoken question about one | which of them it is about | as if it were typed |
| said | a saying, at times with a picture | what is said | its words; "nothing" of noise |
| beeps | beeps; at times a spoken question about them | a typed question, or nothing | number, slope, pitch, timbre |
"""

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from omni.data.conversations import Example, Message, ask

from .conversations import SceneConversations
from .drawing import render
from .rooms import Samples, noise, rough
from .sayings import heard
from .scene import sample_scene, stream
from .sounds import RATE, SOUND_WORDINGS, beep_questions, sample_beeps
from .wordings import WordingSet, vary

Sound = tuple[Samples, int]
"""Samples float32[S] and their rate, as the modality "audio" takes them."""

CROWD = 0.1
"""Part of the sounds in which somebody else speaks far away."""

TURNS = {"spoken": 4, "said": 5}
"""Questions of one conversation, at most."""

TO_ANSWER = ("answer the spoken question", "answer the question", "answer what is asked", "what is the answer")
TO_WRITE = (
    *("what is said", "write down what is said", "what do you hear", "what are the words", "what does the voice say"),
    *("write what you hear", "tell me what is said"),
)
FIRST = ("about the first picture", "answer about the first picture")
SECOND = ("about the second picture", "answer about the second picture")
NOTHING = "nothing"
"""The answer to a sound without words."""


class Sayings:
    """Sounds with transcripts. In the same corpus, a number always gives the same saying and the same sound of it.

    Args:
        folder: of a corpus.
        split, group: which manifests of it.
        count, first: the numbers `first` to `first + count - 1`.
        synthesizers: how often each one speaks; by default all that are there, by the square root of their sayings.
        roughly: part of the sounds that go through `rough`.
        said: the kinds of sayings; by default all.
        fastest: words in a second; faster sayings are left out.

    Raises:
        FileNotFoundError: the corpus has none of these.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        group: str,
        count: int,
        first: int = 0,
        synthesizers: Mapping[str, float] | None = None,
        roughly: float = 0.7,
        said: Sequence[str] | None = None,
        fastest: float | None = None,
    ) -> None:
        self.folder, self.count, self.first, self.roughly = Path(folder), count, first, roughly
        self.name = f"{split}-{group}"
        found = {path.stem.removeprefix(f"{self.name}-"): path for path in self.folder.glob(f"{self.name}-*.jsonl")}
        if missing := sorted(set(synthesizers or found or {self.name: 1}) - set(found)):
            raise FileNotFoundError(
                f"{str(self.folder)!r} has no sayings of {', '.join(missing)} for {self.name!r}; make them with "
                "python -m omni.scenes speak."
            )
        self.rows: dict[str, list[dict[str, Any]]] = {}
        for name, path in sorted(found.items()):
            rows = map(json.loads, path.read_text("utf-8").splitlines())
            self.rows[name] = [
                row
                for row in rows
                if (said is None or row["kind"] in said) and (fastest is None or self._pace(row) <= fastest)
            ]
        self.weights = (
            dict(synthesizers) if synthesizers else {name: len(rows) ** 0.5 for name, rows in self.rows.items()}
        )

    def __len__(self) -> int:
        return self.count

    def synthesizer(self, rng: random.Random) -> str:
        """Who speaks."""
        return rng.choices(list(self.weights), list(self.weights.values()))[0]

    def row(self, index: int) -> dict[str, Any]:
        """The row of the manifest that has this number."""
        rng = stream("saying", self.name, self.first + index)
        row: dict[str, Any] = rng.choice(self.rows[self.synthesizer(rng)])
        return row

    def transcript(self, index: int) -> str:
        """The transcript, for which no sound is opened."""
        text: str = self.row(index)["text"]
        return text

    def lengths(self) -> list[int]:
        """Letters of each number, so that sayings of about one length make a batch."""
        return [len(self.transcript(index)) for index in range(len(self))]

    def __getitem__(self, index: int) -> tuple[Sound, str]:
        row = self.row(index)
        return self.heard(row, self.first + index), row["text"]

    def heard(self, row: Mapping[str, Any], number: int) -> Sound:
        """The sound of a row; the number seeds what happens to it."""
        samples = self._read(row)
        rng = np.random.default_rng([number, len(row["text"])])
        if rng.random() < self.roughly:
            others = self._read(self.row(number + 1)) if rng.random() < CROWD else None
            samples = rough(samples, rng, others)
        return samples, RATE

    def _pace(self, row: Mapping[str, Any]) -> float:
        """Words in a second."""
        seconds: float = import_module("soundfile").info(self.folder / row["audio"]).duration
        return len(row["text"].split()) / seconds

    def _read(self, row: Mapping[str, Any]) -> Samples:
        samples: Samples = import_module("soundfile").read(self.folder / row["audio"], dtype="float32")[0]
        return samples


class Heard:
    """Conversations with sounds in them, and some without, drawn on access; see the table above.

    Args:
        sayings: who speaks, and the numbers.
        typed: the scenes of typed questions, of the same split.
        mix: how often each kind is drawn.
        wordings: of the typed questions about beeps.
    """

    def __init__(
        self, sayings: Sayings, typed: SceneConversations, mix: Mapping[str, float], wordings: WordingSet = "seen"
    ) -> None:
        self.sayings, self.scenes, self.mix, self.wordings = sayings, typed, dict(mix), wordings
        self.split = typed.split
        self.asking: dict[str, dict[int, list[dict[str, Any]]]] = {}  # by synthesizer and scene
        self.about_beeps: dict[str, dict[str, list[dict[str, Any]]]] = {}  # by synthesizer and kind of question
        kinds = {heard(text): kind for kind, words in SOUND_WORDINGS.items() for text in (*words.seen, *words.held_out)}
        for name, rows in sayings.rows.items():
            self.asking[name], self.about_beeps[name] = defaultdict(list), defaultdict(list)
            for row in rows:
                if row["kind"] == "question":
                    self.asking[name][row["scene"]].append(row)
                elif row["kind"] == "sound":
                    self.about_beeps[name][kinds[row["text"]]].append(row)
        self.numbers = {name: list(scenes) for name, scenes in self.asking.items()}

    def __len__(self) -> int:
        return len(self.sayings)

    def __getitem__(self, index: int) -> Example:
        number = self.sayings.first + index
        rng = stream("heard", self.sayings.name, number)
        kind = rng.choices(list(self.mix), list(self.mix.values()))[0]
        made: Example = getattr(self, f"_{kind}")(number, rng)
        return made

    def _typed(self, number: int, rng: random.Random) -> Example:
        return self.scenes[number - self.scenes.first]

    def _asked(self, rng: random.Random, most: int) -> tuple[int, list[dict[str, Any]]]:
        """A scene and spoken questions about it."""
        name = self.sayings.synthesizer(rng)
        scene = rng.choice(self.numbers[name])
        rows = self.asking[name][scene]
        return scene, rng.sample(rows, min(len(rows), rng.randint(1, most)))

    def _spoken(self, number: int, rng: random.Random) -> Example:
        scene, rows = self._asked(rng, TURNS["spoken"])
        sounds = [self.sayings.heard(row, number) for row in rows]
        chat: list[Message] = []
        for turn, row in enumerate(rows):
            items = ["audio"] if turn else rng.choice((["image", "audio"],) * 5 + (["audio", "image"],))
            chat += ask(vary(rng.choice(TO_ANSWER), rng) if rng.random() < 0.2 else "", row["answer"], items)
        shown: dict[str, list[Any]] = {"image": [render(sample_scene(scene, self.split))], "audio": sounds}
        return Example(shown, [chat], unseen=[row["unseen"] for row in rows])

    def _two(self, number: int, rng: random.Random) -> Example:
        scene, (row, *_) = self._asked(rng, 1)
        pictures = [render(sample_scene(scene, self.split)), render(sample_scene(number, self.split))]
        text = rng.choice(FIRST)
        if rng.random() < 0.5:
            pictures, text = pictures[::-1], rng.choice(SECOND)
        shown: dict[str, list[Any]] = {"image": pictures, "audio": [self.sayings.heard(row, number)]}
        return Example(shown, [ask(text, row["answer"], ["image", "image", "audio"])], unseen=[row["unseen"]])

    def _said(self, number: int, rng: random.Random) -> Example:
        chat: list[Message] = []
        sounds, pictures = [], []
        for turn in range(rng.randint(1, TURNS["said"])):
            row = rng.choice(self.sayings.rows[self.sayings.synthesizer(rng)])
            sound, words = self.sayings.heard(row, number + turn), row["text"]
            if rng.random() < 0.04:
                sound, words = silence(len(sound[0]), rng), NOTHING
            items = ["audio"]
            if turn == 0 and rng.random() < 0.15:
                pictures, items = [render(sample_scene(number, self.split))], ["image", "audio"]
            sounds.append(sound)
            chat += ask(vary(rng.choice(TO_WRITE), rng), words, items)
        return Example({"image": pictures, "audio": sounds}, [chat])

    def _beeps(self, number: int, rng: random.Random) -> Example:
        beeps = sample_beeps(number, self.split)
        samples = beeps.play()
        if rng.random() < self.sayings.roughly:
            samples = rough(samples, np.random.default_rng(number), pace=0.0)
        sound = samples, RATE
        asked = beep_questions(beeps, self.wordings)
        if rng.random() < 0.6:
            return Example({"audio": [sound]}, [ask(q.text, q.answer, ["audio"]) for q in asked])
        question, spoken = rng.choice(asked), self.about_beeps[self.sayings.synthesizer(rng)]
        if question.kind not in spoken:  # a small corpus
            return Example({"audio": [sound]}, [ask(question.text, question.answer, ["audio"])])
        voice = self.sayings.heard(rng.choice(spoken[question.kind]), number)
        return Example({"audio": [sound, voice]}, [ask("", question.answer, ["audio", "audio"])])


def silence(length: int, rng: random.Random) -> Sound:
    """Noise without speech, or nearly silence."""
    samples = noise(length, np.random.default_rng(rng.getrandbits(32))) * np.float32(10 ** rng.uniform(-4, -1))
    return samples.clip(-1, 1).astype(np.float32), RATE

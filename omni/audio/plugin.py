"""Sounds as a modality: the bundle, for omni's audio encoder and for those of transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omni.audio.lengths import num_tokens
from omni.audio.sound import LargeSoundError, Sound, SoundError
from omni.audio.sounds import as_sound, count_samples, fetched, is_sound, read_sound, sound_at
from omni.modality import Modality


def grid_shapes(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The number of tokens of each sound, from its frames in `audio_mask` int[I, F].

    Raises:
        SoundError: a sound is too short to make a token.
    """
    shapes: list[tuple[int, ...]] = [
        (int(num_tokens(config, int(sum(mask.tolist())))),) for mask in inputs["audio_mask"]
    ]
    if any(shape < (1,) for shape in shapes):
        raise SoundError("A sound is too short for this encoder, which makes no token of it; lengthen it with silence.")
    return shapes


def build(config: Any) -> Any:
    """The tower for an encoder's configuration of transformers."""
    from omni.audio.towers import build_tower

    return build_tower(config)


def prepare(preprocessor: Any, items: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`audio_features` and `audio_mask` of sounds, from omni's feature extractor or one of transformers.

    Raises:
        SoundError: an item is no sound, contradicts `sampling_rate`, or is longer than the encoder takes.
    """
    options, rate = dict(options), preprocessor.sampling_rate
    items = [fetched(item) for item in items]
    if not isinstance(preprocessor, audio.preprocessor_class):
        sounds = [sound_at(rate, item, options.get("sampling_rate")) for item in items]
        longest = _longest(preprocessor)
        if too_long := [sound for sound in sounds if longest and sound.seconds > longest]:
            raise LargeSoundError(
                f"A sound of {too_long[0].seconds:.1f} s is too large for this encoder, which takes {longest:.1f} s; cut it "
                "into pieces first."
            )
        items = [sound.samples for sound in sounds]
        options |= {"sampling_rate": rate, "return_attention_mask": True}
        if longest is None:
            options.setdefault("padding", True)
    made = preprocessor(items, **options)
    features = made[preprocessor.model_input_names[0]]
    mask = made.get("attention_mask")
    if mask is None:  # all have the same length
        mask = np.ones((len(features), len(features[0])), np.int64)
    return {"audio_features": features, "audio_mask": mask}


def _longest(preprocessor: Any) -> float | None:
    """The longest sound in seconds that a feature extractor of transformers takes whole; None if there is no limit."""
    if hasattr(preprocessor, "n_samples"):  # Whisper's
        return float(preprocessor.n_samples / preprocessor.sampling_rate)
    if hasattr(preprocessor, "max_length"):  # AST's, in frames of 10 ms
        return float(preprocessor.max_length / 100)
    return None


def show(sound: Any) -> Any:
    """A sound as a picture."""
    from omni.audio.drawing import draw

    return draw(as_sound(sound))


def stand_ins(sound: Any, seed: int) -> dict[str, Any]:
    """Silence of the same length, and noise with the same power."""
    sound = as_sound(sound)
    noise = np.random.default_rng(seed).normal(0, np.sqrt(np.mean(sound.samples**2)), len(sound.samples))
    return {
        "blank": Sound(np.zeros_like(sound.samples), sound.rate),
        "noise": Sound(noise.clip(-1, 1).astype(np.float32), sound.rate),
    }


def probes(config: Any, preprocessor: Any) -> list[Sound]:
    """Noise of 1, 0.5 and 1.5 seconds, and a rising tone of one second."""
    rate, random = preprocessor.sampling_rate, np.random.default_rng(0)
    noise = [
        random.normal(0, 0.1, length).clip(-1, 1).astype(np.float32) for length in (rate, rate // 2, 3 * rate // 2)
    ]
    time = np.linspace(0, 1, rate, dtype=np.float32)
    return [Sound(samples, rate) for samples in (*noise, np.sin(2 * np.pi * (100 + 400 * time) * time))]


audio = Modality(
    name="audio",
    token="<audio>",
    argument="audio",
    inputs={"audio_features": "input_features", "audio_mask": "attention_mask"},
    config_class="omni.audio.configuration_audio:OmniAudioConfig",
    model_class="omni.audio.modeling_audio:OmniAudioModel",
    preprocessor_class="omni.audio.feature_extraction_audio:OmniFeatureExtractor",
    build=build,
    prepare=prepare,
    grid_shapes=grid_shapes,
    is_item=is_sound,
    open=read_sound,
    suffixes=(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
    media_types=("audio/*",),
    measure=count_samples,
    unit="samples",
    noun="sound",
    show=show,
    stand_ins=stand_ins,
    probes=probes,
    content=lambda sound: repr(sound.rate).encode() + sound.samples.tobytes(),
)

"""A folder that transformers loads becomes micro-Omni's files again, with the parts that were kept beside it."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    LlamaConfig,
)

from omni.checkpoints.fingerprints import read_tensors, verify_weights
from omni.checkpoints.folder import model_type_of
from omni.checkpoints.seal import MODEL, verify_files
from omni.exchange.micro_omni.files import TOKENIZER, ConversionError, Tensors, listed, read_kept
from omni.exchange.micro_omni.parts import (
    CLASSES,
    ENCODERS,
    LANGUAGE_MODEL,
    ROWS,
    SENSES,
    THINKER,
    TOKENS,
    Conversion,
    build,
    count,
    features,
    shapes,
)
from omni.exchange.micro_omni.settings import their_audio_config, their_thinker_config, their_vision_config
from omni.exchange.micro_omni.weights import (
    EMBEDDING,
    HEAD,
    PROJECTOR,
    audio_names,
    check,
    thinker_names,
    to_theirs,
    vision_names,
)
from omni.exchange.micro_omni.writing import expect_free, save_theirs
from omni.fusion.configuration_omni import OmniConfig


def to_micro_omni(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str]) -> Conversion:
    """Convert a checkpoint to micro-Omni's files.

    Args:
        checkpoint: folder of one of omni's encoders, of a Llama, or of a fused model of a Llama and these encoders, each
            with a linear projector: of pictures over CLS, of sounds over the grid.
        output: a new folder; or a new file that ends with .safetensors (the merged form) or with .pt (if micro-Omni keeps
            the model in one file).

    Raises:
        ConversionError: micro-Omni has no place for something in the checkpoint.
        CheckpointError: the folder holds no checkpoint.
    """
    folder, target = Path(checkpoint), Path(output)
    expect_free(target)
    kind, notes = model_type_of(folder), list[str]()
    if kind not in CLASSES:
        raise ConversionError(
            f"The checkpoint {str(folder)!r} holds a model of type {kind!r}; expected an encoder (omni_vision, omni_audio), "
            "a Thinker (llama), or a fused model (omni)."
        )
    config, tensors = _read_checkpoint(folder, kind)
    kept, settings = read_kept(folder)
    parts: dict[str, Tensors] = {}
    tokenizer = None
    sees, senses = kind == OmniConfig.model_type, [name for name in SENSES if ENCODERS[name] == kind]
    for name in config.modalities if sees else senses:
        encoder = config.modalities[name]["encoder"] if sees else config
        own = _below(f"model.{name}_tower.", tensors) if sees else tensors
        if name == "image":
            theirs = {**settings.get("vision", {}), **their_vision_config(encoder)}
            settings["vision"] = theirs | {"normalize": _normalization(folder, encoder.image_size, notes)}
            names = vision_names(encoder.num_hidden_layers)
        else:
            settings["audio"] = theirs = {**settings.get("audio", {}), **their_audio_config(encoder)}
            older = theirs.pop("older_attention", False)
            names = audio_names(encoder.num_hidden_layers, encoder.time_reduction, older)
            _expect_their_features(folder, features(theirs))
        parts[SENSES[name][0]] = to_theirs(names, own)
        if sees:
            parts[SENSES[name][1]] = to_theirs(PROJECTOR, _below(f"model.{name}_projector.", tensors))
    if kind in (LlamaConfig.model_type, OmniConfig.model_type):
        words = {name.replace(LANGUAGE_MODEL, "model.", 1): tensor for name, tensor in tensors.items()}
        parts |= _their_thinker(config, words, settings)
        tokenizer = _their_tokenizer(folder, target, notes)
    for name, rest in kept.items():
        parts[name] = {**parts.get(name, {}), **rest}
    save_theirs(target, parts, settings, tokenizer)
    return Conversion(
        output=str(output),
        model="micro-Omni",
        parameters={
            name: count(parts[name])
            for name in sorted({THINKER, *(part for sense in SENSES.values() for part in sense[:2])} & set(parts))
            if name == THINKER or name not in kept
        },
        kept=sorted(set(kept) - {THINKER}),
        notes=notes,
        files=[str(folder)],
    )


def _read_checkpoint(folder: Path, kind: str) -> tuple[Any, Tensors]:
    """Configuration and tensors of a checkpoint, checked for completeness and damage."""
    try:
        verify_files(folder, MODEL)
        config = CLASSES[kind][0]().from_pretrained(folder)
        if kind == OmniConfig.model_type:
            _refuse_other_models(config)
        wanted = shapes(build(CLASSES[kind][1](), config))
        tensors = read_tensors(folder)
        verify_weights(folder)
    except ConversionError:
        raise
    except (ValueError, OSError, StrictDataclassError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"The checkpoint {str(folder)!r} cannot be converted: {reason}") from error
    if getattr(config, "tie_word_embeddings", False) and HEAD not in tensors:
        shared = EMBEDDING if kind == LlamaConfig.model_type else EMBEDDING.replace("model.", LANGUAGE_MODEL, 1)
        tensors = tensors | {HEAD: tensors[shared]} if shared in tensors else tensors
    check("model", wanted, tensors)
    return config, tensors


def _refuse_other_models(config: OmniConfig) -> None:
    """Refuse all but micro-Omni's own architecture: its encoders, linear projectors over what it reads of them, a Llama."""
    problems = [f"the modality {name!r}" for name in config.modalities if name not in SENSES]
    problems += [] if config.modalities else ["a model without an encoder"]
    for name, (_, _, output) in SENSES.items():
        if (section := config.modalities.get(name)) is None:
            continue
        if (found := section["encoder"].model_type) != ENCODERS[name]:
            problems.append(f"an encoder of type {found!r} instead of {ENCODERS[name]!r}")
        if (section["projector"], section["output"]) != ("linear", output):
            problems.append(
                f"the projector {section['projector']!r} over {section['output']!r} instead of 'linear' over {output!r}"
            )
    if config.text_config.model_type != LlamaConfig.model_type:
        problems.append(f"a Thinker of type {config.text_config.model_type!r} instead of {LlamaConfig.model_type!r}")
    if config.untrained:
        problems.append(f"untrained parts ({listed(config.untrained)})")
    if problems:
        raise ConversionError(
            f"micro-Omni has no place for {'; '.join(problems)}; only the encoder of this model can be converted, once "
            "OmniVisionModel.from_pretrained and save_pretrained have given it a folder of its own."
        )


def _their_thinker(config: Any, words: Tensors, settings: dict[str, Any]) -> dict[str, Tensors]:
    """The Thinker's tensors. micro-Omni has no placeholders. Their rows become a part of their own if they were trained."""
    sees = isinstance(config, OmniConfig)
    text, known = (config.text_config if sees else config), settings.get("thinker", {})
    vocab = text.vocab_size
    if sees:
        ids = sorted(section["token_id"] for section in config.modalities.values())
        last = ids == [*range(vocab - len(ids), vocab)]
        vocab = known.get("vocab_size", vocab - len(ids) if last else vocab)
    theirs = their_thinker_config(text, vocab)
    theirs["use_gqa"] = theirs["use_gqa"] or known.get("use_gqa", False)
    settings["thinker"] = {**known, **theirs}
    beyond = {key: words[name][vocab:] for key, name in ROWS.items()}
    words = words | {name: words[name][:vocab] for name in ROWS.values()}
    parts = {THINKER: to_theirs(thinker_names(text.num_hidden_layers, joined=not theirs["use_gqa"]), words)}
    return parts | ({TOKENS: beyond} if any(rows.any() for rows in beyond.values()) else {})


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _normalization(folder: Path, image_size: int, notes: list[str]) -> dict[str, Any] | None:
    """Mean and std of the encoder's image processor, if it normalises. micro-Omni does not, so there is a note."""
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except OSError:
        return None
    fixed = {"size": {"height": image_size, "width": image_size}, "resample": 2, "rescale_factor": 1 / 255}
    if apart := [name for name, value in fixed.items() if getattr(processor, name) != value]:
        raise ConversionError(
            f"The image processor in {str(folder)!r} has another {listed(apart)} than micro-Omni, which resizes pictures "
            f"to {image_size}x{image_size} bilinearly and scales them to [0, 1], so its encoder would see other pixels."
        )
    if not processor.do_normalize:
        return None
    mean, std = list(processor.image_mean), list(processor.image_std)
    notes.append(
        f"the encoder was trained on pictures normalised with mean {mean} and std {std}, but micro-Omni feeds values in "
        "[0, 1]; normalise them there"
    )
    return {"mean": mean, "std": std}


def _expect_their_features(folder: Path, theirs: dict[str, Any]) -> None:
    """Refuse an encoder that was trained on other features than those that micro-Omni makes."""
    try:
        extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
    except OSError:
        return
    if apart := [name for name, value in theirs.items() if getattr(extractor, name, None) != value]:
        raise ConversionError(
            f"The feature extractor in {str(folder)!r} has another {listed(apart)} than micro-Omni, so its encoder would "
            "read other features."
        )


def _their_tokenizer(folder: Path, target: Path, notes: list[str]) -> Path | None:
    path = folder / TOKENIZER
    if path.is_file():
        if target.suffix in (".pt", ".safetensors"):
            notes.append(f"{TOKENIZER} is not in {target.name}; copy it from {str(folder)!r}")
        return path
    if (folder / "tokenizer.json").is_file():
        raise ConversionError(
            f"The tokenizer in {str(folder)!r} is no SentencePiece model (there is no {TOKENIZER}), and micro-Omni reads no "
            "other kind."
        )
    notes.append(f"no {TOKENIZER} was found, so micro-Omni gets none")
    return None

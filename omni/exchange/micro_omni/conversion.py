"""Both directions: micro-Omni's files become a folder that transformers loads, and such a folder becomes micro-Omni's files.

    vision.pt                            ->  OmniVisionModel, image processor
    audio_enc.pt                         ->  OmniAudioModel, feature extractor
    thinker.pt, tokenizer.model          ->  LlamaForCausalLM, tokenizer
    omni.pt, vision.pt, audio_enc.pt, tokenizer.model
                                         ->  OmniForConditionalGeneration, processor; so does a merged file

A fused model sees, hears or does both, by the encoders that there are. Parts that the model does not have (speech, the heads
of training) are kept in a file beside it. The way back puts them into micro-Omni's files again.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from omni.checkpoints.fingerprints import read_tensors, verify_weights
from omni.checkpoints.folder import model_type_of
from omni.checkpoints.seal import MODEL, verify_files
from omni.exchange.micro_omni.files import (
    KEPT,
    TOKENIZER,
    ConversionError,
    Source,
    Tensors,
    expect_free,
    finished,
    listed,
    read,
    read_kept,
    save_kept,
    save_theirs,
)
from omni.exchange.micro_omni.tokenizer import convert_tokenizer
from omni.exchange.micro_omni.weights import (
    EMBEDDING,
    HEAD,
    PROJECTOR,
    audio_names,
    audio_settings,
    check,
    their_audio_config,
    their_thinker_config,
    their_vision_config,
    thinker_config,
    thinker_names,
    to_ours,
    to_theirs,
    vision_names,
    vision_settings,
)
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.registry import get_modality

ENCODER, AUDIO, THINKER, TOKENS = "vision_encoder", "audio_encoder", "thinker", "image_token"
"""The parts of micro-Omni that omni has too; and the rows of embedding and head that only omni has, for placeholders."""
SENSES = {"image": (ENCODER, "proj_v", "cls"), "audio": (AUDIO, "proj_a", "grid")}
"""For each modality its encoder, its linear projector, and the tokens that the projector reads."""
LANGUAGE_MODEL = "model.language_model."
ROWS = {"embedding": EMBEDDING, "head": HEAD}
ENCODERS = {"image": "omni_vision", "audio": "omni_audio"}
CLASSES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    ENCODERS["image"]: (lambda: get_modality("image").config_class, lambda: get_modality("image").model_class),
    ENCODERS["audio"]: (lambda: get_modality("audio").config_class, lambda: get_modality("audio").model_class),
    LlamaConfig.model_type: (lambda: LlamaConfig, lambda: LlamaForCausalLM),
    OmniConfig.model_type: (lambda: OmniConfig, lambda: OmniForConditionalGeneration),
}
"""Configuration and model class for each type of checkpoint that micro-Omni can take. They are loaded when needed."""


class Conversion(BaseModel):
    """The result of a conversion.

    Attributes:
        output: the file or folder that was written.
        model: the class that loads it, or "micro-Omni".
        parameters: number of parameters of each part.
        kept: parts that the model does not have. They are kept unchanged in a file beside it.
        left: entries that were left behind, such as the state of an optimizer.
        notes: assumptions, and what users of the result need to know.
        files: the files that were read.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    model: str
    parameters: dict[str, int]
    kept: list[str] = []
    left: list[str] = []
    notes: list[str] = []
    files: list[str] = []


# --- From micro-Omni --------------------------------------------------------------------------------------------------


def convert(sources: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> Conversion:
    """Convert files of micro-Omni to a checkpoint that transformers loads.

    Args:
        sources: files of micro-Omni (vision.pt, omni.pt, thinker.pt, a merged .safetensors, tokenizer.model, a JSON
            configuration) or folders of them. Files that belong to a named file and lie beside it are read, too.
        output: the new folder.

    Raises:
        ConversionError: a file cannot be used, or a tensor has no place; the message names it. Nothing is written then.
    """
    expect_free(Path(output))
    source, notes = read(sources), list[str]()
    senses = [name for name, (encoder, projection, _) in SENSES.items() if {encoder, projection} <= source.parts.keys()]
    found = {ENCODER, "proj_v", THINKER} & source.parts.keys() or {AUDIO} & source.parts.keys()
    if fused := THINKER in found and senses and found <= {part for name in senses for part in SENSES[name]} | {THINKER}:
        found = {THINKER} | {part for name in senses for part in SENSES[name][:2]}
    files = [str(path) for path in source.files]
    kept = {name: tensors for name, tensors in source.parts.items() if name not in (*found, TOKENS)}
    if rotary := _take_rotary(source):
        kept[THINKER] = rotary
    companions: list[Any] = []
    if found == {ENCODER}:
        model = _encoder(source, notes)
        companions = [_image_processor(model.config, source)]
    elif found == {AUDIO}:
        model = _audio_encoder(source, notes)
        companions = [_feature_extractor(source)]
    elif found == {THINKER}:
        model = _thinker(source, rotary, notes)
        tokenizer = _tokenizer(source, model.config, [], notes)
        companions = [tokenizer] if tokenizer is not None else []
    elif fused:
        towers = {
            name: _encoder(source, notes) if name == "image" else _audio_encoder(source, notes) for name in senses
        }
        thinker = _thinker(source, rotary, notes)
        tokenizer = _tokenizer(source, thinker.config, [get_modality(name).token for name in senses], notes)
        model = _fused(towers, thinker, tokenizer, source)
        if tokenizer is not None:
            preprocessors = {
                name: _image_processor(tower.config, source) if name == "image" else _feature_extractor(source)
                for name, tower in towers.items()
            }
            sections = model.config.modalities
            companions = [OmniProcessor(tokenizer=tokenizer, preprocessors=preprocessors, modalities=sections)]
    else:
        lacking = listed(sorted({ENCODER, "proj_v", THINKER} - found))
        raise ConversionError(
            f"Found {listed(sorted(found))} in {listed(files)}, but no {lacking}; a fused model needs all three, so name "
            "the other files, too: `omni convert omni.pt vision.pt OUT` (only vision.pt holds the encoder)."
        )
    with finished(Path(output)) as folder:
        model.save_pretrained(folder)
        for companion in companions:
            companion.save_pretrained(folder)
        if source.tokenizer is not None and THINKER in found:
            shutil.copyfile(source.tokenizer, folder / TOKENIZER)
        save_kept(folder / KEPT, kept, source.config)
    return Conversion(
        output=str(output),
        model=type(model).__name__,
        parameters={name: _count(source.parts[name]) for name in sorted(found)},
        kept=sorted(set(kept) - found),
        left=list(dict.fromkeys(source.left)),
        notes=notes,
        files=files,
    )


def _take_rotary(source: Source) -> Tensors:
    """Take out the rotary frequencies, which some versions of micro-Omni save in every block of the Thinker."""
    thinker = source.parts.get(THINKER, {})
    return {name: thinker.pop(name) for name in list(thinker) if name.endswith(".inv_freq")}


def _encoder(source: Source, notes: list[str]) -> PreTrainedModel:
    modality = get_modality("image")
    tensors = source.parts[ENCODER]
    with _settings("vision encoder"):
        config = modality.config_class(**vision_settings(tensors, source.section("vision"), notes))
    model = _build(modality.model_class, config)
    names = vision_names(config.num_hidden_layers)
    model.load_state_dict(to_ours("vision encoder", names, _shapes(model), tensors), assign=True)
    return model


def _audio_encoder(source: Source, notes: list[str]) -> PreTrainedModel:
    modality, tensors, section = get_modality("audio"), source.parts[AUDIO], source.section("audio")
    with _settings("audio encoder"):
        config = modality.config_class(**audio_settings(tensors, section, notes))
    model = _build(modality.model_class, config)
    older = "blocks.0.attn.in_proj_weight" in tensors
    source.config["audio"] = {**section, "older_attention": older}  # kept for the way back
    names = audio_names(config.num_hidden_layers, config.time_reduction, older)
    model.load_state_dict(to_ours("audio encoder", names, _shapes(model), tensors), assign=True)
    return model


def _feature_extractor(source: Source) -> Any:
    """The feature extractor of micro-Omni's audio encoder: power in mel bands, without a logarithm."""
    return get_modality("audio").preprocessor_class(**_features(source.section("audio")))


def _features(section: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the feature extractor. Those without a key in micro-Omni's configuration are fixed in its code."""
    return {
        "sampling_rate": section.get("sample_rate", 16_000),
        "n_fft": 1024,
        "win_length": section.get("frame_win", 400),
        "hop_length": section.get("frame_hop", 160),
        "num_mel_bins": section.get("mel_bins", 128),
        "mel_scale": "htk",
        "log_mel": False,
        "do_normalize": False,
    }


def _thinker(source: Source, rotary: Tensors, notes: list[str]) -> PreTrainedModel:
    tensors = source.parts[THINKER]
    with _settings("Thinker"):
        config = thinker_config(tensors, source.section("thinker"), list(rotary.values()), notes)
    model = _build(LlamaForCausalLM, config)
    joined = "blocks.0.attn.qkv.weight" in tensors
    # kept for the way back: `<image>` adds to the vocabulary, and a Llama with one head does not show if it had groups
    known = {"use_gqa": not joined, "vocab_size": config.vocab_size}
    source.config["thinker"] = {**source.section("thinker"), **known}
    names = thinker_names(config.num_hidden_layers, joined)
    model.load_state_dict(to_ours("Thinker", names, _shapes(model), tensors), assign=True)
    return model


def _fused(
    towers: Mapping[str, PreTrainedModel],
    thinker: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    source: Source,
) -> PreTrainedModel:
    """Encoders, `proj_v`, `proj_a` and Thinker as one model. Embedding and head get a row for each placeholder."""
    text, vocab = thinker.config, thinker.config.vocab_size
    first = vocab if tokenizer is None else len(tokenizer) - len(towers)
    text.vocab_size = max(vocab, first + len(towers))
    sections, state = dict[str, dict[str, Any]](), dict[str, torch.Tensor]()
    for token_id, (name, tower) in enumerate(towers.items(), first):
        _, projection, output = SENSES[name]
        side = tower.config.hidden_size
        shapes = {"linear.weight": (text.hidden_size, side), "linear.bias": (text.hidden_size,)}
        projector = to_ours(f"projector ({projection})", PROJECTOR, shapes, source.parts[projection])
        sections[name] = {"encoder": tower.config, "token_id": token_id, "output": output, "projector": "linear"}
        state |= {f"model.{name}_tower.{key}": tensor for key, tensor in tower.state_dict().items()}
        state |= {f"model.{name}_projector.{key}": tensor for key, tensor in projector.items()}
    words = thinker.state_dict()
    for key, name in ROWS.items():
        row = words[name].new_zeros(text.vocab_size - vocab, text.hidden_size)
        known = source.parts.get(TOKENS, {}).get(key, row)
        if known.shape != row.shape:
            raise ConversionError(
                f"{TOKENS}.{key} has the shape {tuple(known.shape)}, expected {tuple(row.shape)}, the rows that follow "
                f"the {vocab} of the Thinker; convert files that belong together."
            )
        words[name] = torch.cat([words[name], known])
    state |= {name.replace("model.", LANGUAGE_MODEL, 1): tensor for name, tensor in words.items()}
    model = _build(OmniForConditionalGeneration, OmniConfig(modalities=sections, text_config=text))
    check("model", _shapes(model), state)
    model.load_state_dict(state, assign=True)
    return model


@contextmanager
def _settings(part: str) -> Iterator[None]:
    """Turn errors of a configuration class into a `ConversionError` about micro-Omni's configuration."""
    try:
        yield
    except ConversionError:
        raise
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"The configuration of the {part} cannot be used ({reason}); correct it.") from error


def _build(model_class: Any, config: Any) -> PreTrainedModel:
    """A model on the meta device, which has shapes and takes no memory."""
    with torch.device("meta"):
        built: PreTrainedModel = model_class(config)
    return built


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _count(tensors: Tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _image_processor(config: Any, source: Source) -> Any:
    """The image processor. micro-Omni uses values in [0, 1]; the configuration of an encoder from omni has mean and std."""
    known = source.section("vision").get("normalize")
    settings = {"image_mean": known["mean"], "image_std": known["std"]} if known else {"do_normalize": False}
    side = config.image_size
    return get_modality("image").preprocessor_class(size={"height": side, "width": side}, **settings)


def _tokenizer(
    source: Source, config: LlamaConfig, placeholders: Sequence[str], notes: list[str]
) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a Thinker, with placeholders added if there are any."""
    if source.tokenizer is None:
        notes.append(f"no {TOKENIZER} was found, so the Thinker has no tokenizer; convert again and name the file, too")
        return None
    tokenizer = convert_tokenizer(source.tokenizer, placeholders, config.max_position_embeddings)
    pieces = len(tokenizer) - len(placeholders)
    if pieces > config.vocab_size:
        raise ConversionError(
            f"{str(source.tokenizer)!r} has {pieces} pieces, but the Thinker knows only {config.vocab_size}; name the "
            "tokenizer that it was trained with."
        )
    return tokenizer


# --- To micro-Omni ----------------------------------------------------------------------------------------------------


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
            _expect_their_features(folder, _features(theirs))
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
            name: _count(parts[name])
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
        wanted = _shapes(_build(CLASSES[kind][1](), config))
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

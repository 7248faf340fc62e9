"""The two ways: micro-Omni's files to a folder that transformers loads, and such a folder to micro-Omni's files.

    vision.pt                            ->  OmniVisionModel, image processor
    thinker.pt, tokenizer.model          ->  LlamaForCausalLM, tokenizer
    omni.pt, vision.pt, tokenizer.model  ->  OmniForConditionalGeneration, processor; so does a merged file

What omni has no part for (audio, speech, the heads of contrastive training) is kept beside the model as it is, and is in
micro-Omni's files again after the way back.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from transformers import AutoImageProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from omni.checkpoints.fingerprints import read_tensors, verify_weights
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
    check,
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
from omni.loading.checkpoint import model_type_of
from omni.registry import get_modality

ENCODER, PROJECTION, THINKER, IMAGE_TOKEN = "vision_encoder", "proj_v", "thinker", "image_token"
"""Parts of micro-Omni that omni has, and the rows of a vocabulary that only omni has."""
TOWER, PROJECTED_BY, DECODER = "model.image_tower.", "model.image_projector.", "model.language_model."
ROWS = {"embedding": EMBEDDING, "head": HEAD}
ENCODER_TYPE = "omni_vision"
CLASSES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    ENCODER_TYPE: (lambda: get_modality("image").config_class, lambda: get_modality("image").model_class),
    LlamaConfig.model_type: (lambda: LlamaConfig, lambda: LlamaForCausalLM),
    OmniConfig.model_type: (lambda: OmniConfig, lambda: OmniForConditionalGeneration),
}
"""What can go to micro-Omni: configurations and models; the encoder is met through the registry, and not before."""


class Conversion(BaseModel):
    """What was converted.

    Attributes:
        output: where it was written.
        model: the class that loads it; or "micro-Omni".
        parameters: how many each part has.
        kept: parts that the model has no place for, which are beside it as they were.
        left: states of training, which were left behind.
        notes: what had to be assumed, and what to know when the result is used.
        files: what was read.
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
    """Make a checkpoint that transformers loads from files of micro-Omni.

    Args:
        sources: its files (vision.pt, omni.pt, thinker.pt, a merged .safetensors, tokenizer.model, a JSON configuration)
            or folders of them. What lies beside a file and belongs to it is found.
        output: a folder that is not there yet.

    Raises:
        ConversionError: a file that cannot be used, or tensors without a place, by name. Nothing is written then.
    """
    expect_free(Path(output))
    source, notes = read(sources), list[str]()
    found, files = {ENCODER, PROJECTION, THINKER} & set(source.parts), [str(path) for path in source.files]
    kept = {name: tensors for name, tensors in source.parts.items() if name not in (*found, IMAGE_TOKEN)}
    if rotary := _take_rotary(source):
        kept[THINKER] = rotary
    companions: list[Any] = []
    if found == {ENCODER}:
        model = _encoder(source, notes)
        companions = [_image_processor(model.config, source)]
    elif found == {THINKER}:
        model = _thinker(source, rotary, notes)
        tokenizer = _tokenizer(source, model.config, None, notes)
        companions = [tokenizer] if tokenizer is not None else []
    elif found == {ENCODER, PROJECTION, THINKER}:
        encoder, thinker = _encoder(source, notes), _thinker(source, rotary, notes)
        tokenizer = _tokenizer(source, thinker.config, get_modality("image").token, notes)
        model = _fused(encoder, thinker, tokenizer, source)
        if tokenizer is not None:
            images = _image_processor(encoder.config, source)
            companions = [
                OmniProcessor(image_processor=images, tokenizer=tokenizer, modalities=model.config.modalities)
            ]
    else:
        lacking = listed(sorted({ENCODER, PROJECTION, THINKER} - found))
        raise ConversionError(
            f"Found {listed(sorted(found))} in {listed(files)}, but no {lacking}; a model that sees needs all "
            "three, so name the other files too: `omni convert omni.pt vision.pt OUT` (the encoder is in vision.pt alone)."
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
    """The frequencies of its positions, which some versions of micro-Omni save in every block of the Thinker."""
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


def _thinker(source: Source, rotary: Tensors, notes: list[str]) -> PreTrainedModel:
    tensors = source.parts[THINKER]
    with _settings("Thinker"):
        config = thinker_config(tensors, source.section("thinker"), list(rotary.values()), notes)
    model = _build(LlamaForCausalLM, config)
    joined = "blocks.0.attn.qkv.weight" in tensors
    # remembered for the way back, on which a vocabulary has grown and one head may be one group or none
    known = {"use_gqa": not joined, "vocab_size": config.vocab_size}
    source.config["thinker"] = {**source.section("thinker"), **known}
    names = thinker_names(config.num_hidden_layers, joined)
    model.load_state_dict(to_ours("Thinker", names, _shapes(model), tensors), assign=True)
    return model


def _fused(
    encoder: PreTrainedModel, thinker: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, source: Source
) -> PreTrainedModel:
    """Encoder and Thinker in one, with micro-Omni's `proj_v`, and a row of the vocabulary for pictures' placeholder."""
    text, side = thinker.config, encoder.config.hidden_size
    vocab = text.vocab_size
    token_id = vocab if tokenizer is None else len(tokenizer) - 1
    text.vocab_size = max(vocab, token_id + 1)
    shapes = {"linear.weight": (text.hidden_size, side), "linear.bias": (text.hidden_size,)}
    projector = to_ours("projector (proj_v)", PROJECTOR, shapes, source.parts[PROJECTION])
    words = thinker.state_dict()
    for key, name in ROWS.items():
        row = words[name].new_zeros(text.vocab_size - vocab, text.hidden_size)
        known = source.parts.get(IMAGE_TOKEN, {}).get(key, row)
        if known.shape != row.shape:
            raise ConversionError(
                f"{IMAGE_TOKEN}.{key} is {tuple(known.shape)}, expected {tuple(row.shape)}: the rows of the vocabulary "
                f"after the {vocab} of the Thinker."
            )
        words[name] = torch.cat([words[name], known])
    state = {TOWER + name: tensor for name, tensor in encoder.state_dict().items()}
    state |= {PROJECTED_BY + name: tensor for name, tensor in projector.items()}
    state |= {name.replace("model.", DECODER, 1): tensor for name, tensor in words.items()}
    section = {"encoder": encoder.config, "token_id": token_id, "output": "cls", "projector": "linear"}
    model = _build(OmniForConditionalGeneration, OmniConfig(modalities={"image": section}, text_config=text))
    check("model", _shapes(model), state)
    model.load_state_dict(state, assign=True)
    return model


@contextmanager
def _settings(part: str) -> Iterator[None]:
    """Inside, settings of a wrong kind are mistakes in micro-Omni's configuration."""
    try:
        yield
    except ConversionError:
        raise
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"The configuration of the {part} cannot be used ({reason}); correct it.") from error


def _build(model_class: Any, config: Any) -> PreTrainedModel:
    """A model without weights, which takes no memory."""
    with torch.device("meta"):
        built: PreTrainedModel = model_class(config)
    return built


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _count(tensors: Tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _image_processor(config: Any, source: Source) -> Any:
    """micro-Omni feeds plain [0, 1] values; an encoder that came from omni says what it was trained on."""
    known = source.section("vision").get("normalize")
    settings = {"image_mean": known["mean"], "image_std": known["std"]} if known else {"do_normalize": False}
    side = config.image_size
    return get_modality("image").preprocessor_class(size={"height": side, "width": side}, **settings)


def _tokenizer(
    source: Source, config: LlamaConfig, placeholder: str | None, notes: list[str]
) -> PreTrainedTokenizerFast | None:
    """The tokenizer for a Thinker, with a placeholder for pictures if it gets one."""
    if source.tokenizer is None:
        notes.append(f"no {TOKENIZER} was found, so there is none for the Thinker; convert again and name it, too")
        return None
    tokenizer = convert_tokenizer(source.tokenizer, placeholder, config.max_position_embeddings)
    pieces = len(tokenizer) - (placeholder is not None)
    if pieces > config.vocab_size:
        raise ConversionError(
            f"{str(source.tokenizer)!r} has {pieces} pieces, more than the {config.vocab_size} that the Thinker knows; name "
            "the tokenizer that it was trained with."
        )
    return tokenizer


# --- To micro-Omni ----------------------------------------------------------------------------------------------------


def to_micro_omni(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str]) -> Conversion:
    """Write a checkpoint as micro-Omni's files.

    Args:
        checkpoint: the folder of an encoder of omni, of a Llama, or of a model of both with a linear projector over CLS.
        output: a folder that is not there yet; or one file, ending with .pt (not for a model of several files) or with
            .safetensors (the merged form).

    Raises:
        ConversionError: a checkpoint that micro-Omni has no place for.
        CheckpointError: no checkpoint.
    """
    folder, target = Path(checkpoint), Path(output)
    expect_free(target)
    kind, notes = model_type_of(folder), list[str]()
    if kind not in CLASSES:
        raise ConversionError(
            f"The checkpoint {str(folder)!r} holds a model of type {kind!r}; micro-Omni has an encoder (omni_vision), a "
            "Thinker (llama), and a model of both (omni)."
        )
    config, tensors = _read_checkpoint(folder, kind)
    kept, settings = read_kept(folder)
    parts: dict[str, Tensors] = {}
    tokenizer = None
    if kind in (ENCODER_TYPE, OmniConfig.model_type):
        encoder = config if kind == ENCODER_TYPE else config.image_config
        theirs = {**settings.get("vision", {}), **their_vision_config(encoder)}
        settings["vision"] = theirs | {"normalize": _normalization(folder, encoder.image_size, notes)}
        names = vision_names(encoder.num_hidden_layers)
        parts[ENCODER] = to_theirs(names, tensors if kind == ENCODER_TYPE else _below(TOWER, tensors))
    if kind == OmniConfig.model_type:
        parts[PROJECTION] = to_theirs(PROJECTOR, _below(PROJECTED_BY, tensors))
    if kind in (LlamaConfig.model_type, OmniConfig.model_type):
        words = {name.replace(DECODER, "model.", 1): tensor for name, tensor in tensors.items()}
        parts |= _their_thinker(config, words, settings)
        tokenizer = _their_tokenizer(folder, target, notes)
    for name, rest in kept.items():
        parts[name] = {**parts.get(name, {}), **rest}
    save_theirs(target, parts, settings, tokenizer)
    return Conversion(
        output=str(output),
        model="micro-Omni",
        parameters={name: _count(parts[name]) for name in sorted({ENCODER, PROJECTION, THINKER} & set(parts))},
        kept=sorted(set(kept) - {THINKER}),
        notes=notes,
        files=[str(folder)],
    )


def _read_checkpoint(folder: Path, kind: str) -> tuple[Any, Tensors]:
    """Configuration and tensors of a checkpoint, complete and as they were saved."""
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
        shared = EMBEDDING if kind == LlamaConfig.model_type else EMBEDDING.replace("model.", DECODER, 1)
        tensors = tensors | {HEAD: tensors[shared]} if shared in tensors else tensors
    check("model", wanted, tensors)
    return config, tensors


def _refuse_other_models(config: OmniConfig) -> None:
    """micro-Omni has one encoder and a linear projector of its CLS."""
    problems = [f"the modality {name!r}" for name in config.modalities if name != "image"]
    if (section := config.modalities.get("image")) is None:
        problems.append("no pictures")
    else:
        if section["encoder"].model_type != ENCODER_TYPE:
            problems.append(f"an encoder of type {section['encoder'].model_type!r} instead of {ENCODER_TYPE!r}")
        if (section["projector"], section["output"]) != ("linear", "cls"):
            problems.append(
                f"the projector {section['projector']!r} over {section['output']!r} instead of 'linear' over 'cls'"
            )
    if config.text_config.model_type != LlamaConfig.model_type:
        problems.append(f"a Thinker of type {config.text_config.model_type!r} instead of {LlamaConfig.model_type!r}")
    if config.untrained:
        problems.append(f"untrained parts ({listed(config.untrained)})")
    if problems:
        raise ConversionError(
            f"micro-Omni has no place for what this model has: {'; '.join(problems)}; only its encoder can be converted, "
            "after OmniVisionModel.from_pretrained and save_pretrained have given it a folder of its own."
        )


def _their_thinker(config: Any, words: Tensors, settings: dict[str, Any]) -> dict[str, Tensors]:
    """The Thinker's tensors; rows for placeholders of pictures apart, if they were trained, as micro-Omni has none."""
    sees = isinstance(config, OmniConfig)
    text, known = (config.text_config if sees else config), settings.get("thinker", {})
    vocab = text.vocab_size
    if sees:
        token_id = config.modalities["image"]["token_id"]
        vocab = known.get("vocab_size", token_id if token_id == vocab - 1 else vocab)
    theirs = their_thinker_config(text, vocab)
    theirs["use_gqa"] = theirs["use_gqa"] or known.get("use_gqa", False)
    settings["thinker"] = {**known, **theirs}
    beyond = {key: words[name][vocab:] for key, name in ROWS.items()}
    words = words | {name: words[name][:vocab] for name in ROWS.values()}
    parts = {THINKER: to_theirs(thinker_names(text.num_hidden_layers, joined=not theirs["use_gqa"]), words)}
    return parts | ({IMAGE_TOKEN: beyond} if any(rows.any() for rows in beyond.values()) else {})


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _normalization(folder: Path, image_size: int, notes: list[str]) -> dict[str, Any] | None:
    """How the encoder's pictures were normalised, if they were; micro-Omni does not, so whoever uses it has to know."""
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except OSError:
        return None
    fixed = {"size": {"height": image_size, "width": image_size}, "resample": 2, "rescale_factor": 1 / 255}
    if apart := [name for name, value in fixed.items() if getattr(processor, name) != value]:
        raise ConversionError(
            f"The image processor in {str(folder)!r} has another {listed(apart)} than micro-Omni, which squashes pictures "
            f"to {image_size}x{image_size} bilinearly and scales them to [0, 1]; there its encoder would see other pictures."
        )
    if not processor.do_normalize:
        return None
    mean, std = list(processor.image_mean), list(processor.image_std)
    notes.append(
        f"the encoder learnt from pictures normalised by mean {mean} and std {std}, but micro-Omni feeds plain [0, 1]: "
        "normalise them there"
    )
    return {"mean": mean, "std": std}


def _their_tokenizer(folder: Path, target: Path, notes: list[str]) -> Path | None:
    path = folder / TOKENIZER
    if path.is_file():
        if target.suffix in (".pt", ".safetensors"):
            notes.append(f"{TOKENIZER} is no part of one file; copy it from {str(folder)!r}")
        return path
    if (folder / "tokenizer.json").is_file():
        raise ConversionError(
            f"The tokenizer in {str(folder)!r} is no SentencePiece model (there is no {TOKENIZER}), the only kind that "
            "micro-Omni reads."
        )
    notes.append(f"no {TOKENIZER} was found, so micro-Omni gets none")
    return None

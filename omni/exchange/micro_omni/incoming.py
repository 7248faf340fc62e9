"""micro-Omni's files become a folder that transformers loads.

    vision.pt                            ->  OmniVisionModel, image processor
    audio_enc.pt                         ->  OmniAudioModel, feature extractor
    thinker.pt, tokenizer.model          ->  LlamaForCausalLM, tokenizer
    omni.pt, vision.pt, audio_enc.pt, tokenizer.model
                                         ->  OmniForConditionalGeneration, processor; so does a merged file

A fused model sees, hears or does both, by the encoders that there are. Parts that the model does not have (speech, the heads
of training) are kept in a file beside it.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from omni.exchange.micro_omni.files import KEPT, TOKENIZER, ConversionError, Source, Tensors, listed, read
from omni.exchange.micro_omni.parts import (
    AUDIO,
    ENCODER,
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
from omni.exchange.micro_omni.settings import audio_settings, thinker_config, vision_settings
from omni.exchange.micro_omni.tokenizer import convert_tokenizer
from omni.exchange.micro_omni.weights import PROJECTOR, audio_names, check, thinker_names, to_ours, vision_names
from omni.exchange.micro_omni.writing import expect_free, finished, save_kept
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.registry import get_modality


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
    if not fused and found not in ({ENCODER}, {AUDIO}, {THINKER}):
        lacking = listed(sorted({ENCODER, "proj_v", THINKER} - found))
        raise ConversionError(
            f"Found {listed(sorted(found))} in {listed(files)}, but no {lacking}; a fused model needs all three, so name "
            "the other files, too: `omni convert omni.pt vision.pt OUT` (only vision.pt holds the encoder)."
        )
    if THINKER not in found:
        (name,) = (name for name, (encoder, _, _) in SENSES.items() if encoder in found)
        model = _tower(name, source, notes)
        companion: Any = _preprocessor(name, model.config, source)
    else:
        towers = {name: _tower(name, source, notes) for name in senses if fused}
        thinker = model = _thinker(source, rotary, notes)
        companion = tokenizer = _tokenizer(source, thinker.config, [get_modality(name).token for name in towers], notes)
        if fused:
            model = _fused(towers, thinker, tokenizer, source)
        if fused and tokenizer is not None:
            preprocessors = {name: _preprocessor(name, tower.config, source) for name, tower in towers.items()}
            sections = model.config.modalities
            companion = OmniProcessor(tokenizer=tokenizer, preprocessors=preprocessors, modalities=sections)
    with finished(Path(output)) as folder:
        model.save_pretrained(folder)
        if companion is not None:
            companion.save_pretrained(folder)
        if source.tokenizer is not None and THINKER in found:
            shutil.copyfile(source.tokenizer, folder / TOKENIZER)
        save_kept(folder / KEPT, kept, source.config)
    return Conversion(
        output=str(output),
        model=type(model).__name__,
        parameters={name: count(source.parts[name]) for name in sorted(found)},
        kept=sorted(set(kept) - found),
        left=list(dict.fromkeys(source.left)),
        notes=notes,
        files=files,
    )


def _take_rotary(source: Source) -> Tensors:
    """Take out the rotary frequencies, which some versions of micro-Omni save in every block of the Thinker."""
    thinker = source.parts.get(THINKER, {})
    return {name: thinker.pop(name) for name in list(thinker) if name.endswith(".inv_freq")}


def _tower(name: str, source: Source, notes: list[str]) -> PreTrainedModel:
    return _encoder(source, notes) if name == "image" else _audio_encoder(source, notes)


def _preprocessor(name: str, config: Any, source: Source) -> Any:
    return _image_processor(config, source) if name == "image" else _feature_extractor(source)


def _encoder(source: Source, notes: list[str]) -> PreTrainedModel:
    modality = get_modality("image")
    tensors = source.parts[ENCODER]
    with _settings("vision encoder"):
        config = modality.config_class(**vision_settings(tensors, source.section("vision"), notes))
    model = build(modality.model_class, config)
    names = vision_names(config.num_hidden_layers)
    model.load_state_dict(to_ours("vision encoder", names, shapes(model), tensors), assign=True)
    return model


def _audio_encoder(source: Source, notes: list[str]) -> PreTrainedModel:
    modality, tensors, section = get_modality("audio"), source.parts[AUDIO], source.section("audio")
    with _settings("audio encoder"):
        config = modality.config_class(**audio_settings(tensors, section, notes))
    model = build(modality.model_class, config)
    older = "blocks.0.attn.in_proj_weight" in tensors
    source.config["audio"] = {**section, "older_attention": older}  # kept for the way back
    names = audio_names(config.num_hidden_layers, config.time_reduction, older)
    model.load_state_dict(to_ours("audio encoder", names, shapes(model), tensors), assign=True)
    return model


def _feature_extractor(source: Source) -> Any:
    """The feature extractor of micro-Omni's audio encoder: power in mel bands, without a logarithm."""
    return get_modality("audio").preprocessor_class(**features(source.section("audio")))


def _thinker(source: Source, rotary: Tensors, notes: list[str]) -> PreTrainedModel:
    tensors = source.parts[THINKER]
    with _settings("Thinker"):
        config = thinker_config(tensors, source.section("thinker"), list(rotary.values()), notes)
    model = build(LlamaForCausalLM, config)
    joined = "blocks.0.attn.qkv.weight" in tensors
    # kept for the way back: `<image>` adds to the vocabulary, and a Llama with one head does not show if it had groups
    known = {"use_gqa": not joined, "vocab_size": config.vocab_size}
    source.config["thinker"] = {**source.section("thinker"), **known}
    names = thinker_names(config.num_hidden_layers, joined)
    model.load_state_dict(to_ours("Thinker", names, shapes(model), tensors), assign=True)
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
        wanted = {"linear.weight": (text.hidden_size, side), "linear.bias": (text.hidden_size,)}
        projector = to_ours(f"projector ({projection})", PROJECTOR, wanted, source.parts[projection])
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
    model = build(OmniForConditionalGeneration, OmniConfig(modalities=sections, text_config=text))
    check("model", shapes(model), state)
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

"""Compose a fused model of encoders and a causal language model, each from a folder of its own.

    encoder of pictures (CLIP, SigLIP, DINOv2, ViT, omni's own) ─▶ image_tower, unchanged; image_projector: new and untrained
    encoder of sounds (Whisper, wav2vec 2, AST, omni's own)     ─▶ audio_tower, unchanged; audio_projector: new and untrained
    an encoder of any other registered modality                 ─▶ the same under its name
    any causal language model, its tokenizer and chat template  ─▶ language_model and lm_head, unchanged

    composition = compose({"image": "clip-vit-base-patch16", "audio": "whisper-tiny"}, "Qwen2.5-0.5B-Instruct")
    composition.save("mine")

From a model of several parts, such as CLIP, the part that encodes is taken. Parts that do not fit are refused, with the
reason: tensors are missing or left over, the encoder reads something else, the language model is not causal, or its prompts
cannot hold an item. Every choice of `compose` is a note.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from omni.checkpoints.folder import CheckpointError
from omni.exchange.chats import add_placeholder, prepare_chats
from omni.exchange.folders import read_encoder, read_thinker, reading
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.fusion.signature import CACHE
from omni.grids import INTERPOLATIONS
from omni.items import Item, nouns
from omni.loading.checkpoint import save_new
from omni.loading.encoder import Encoder
from omni.projectors import PROJECTORS, Projector
from omni.questions import make_prompts

FACTORS = (2, 3)
"""Patches along each side that `unshuffle_mlp` folds into one token. The first of these that divides the grid is taken; a
grid of one axis is divided by any."""

AT_ONCE = 16
"""The number of items that are encoded at once."""

WORDS = 4096
"""The number of embedded words whose size is measured."""

WIDEST = 1024
"""Whitening is a square matrix of the width of what is read; wider than this, it would be most of a checkpoint."""


@dataclass(frozen=True)
class Composition:
    """The result of `compose`.

    Attributes:
        model: the fused model; its `config.untrained` names the projectors.
        processor: its processor.
        notes: the choices that `compose` made, one sentence each.
        folders: of the parts.
    """

    model: OmniForConditionalGeneration
    processor: OmniProcessor
    notes: tuple[str, ...]
    folders: Mapping[str, str]

    def save(self, folder: str | Path, apart: bool = False) -> Path:
        """Write the checkpoint. If writing fails, no folder of that name appears.

        Args:
            folder: a new one.
            apart: whether the parts stay in their folders; the checkpoint then holds the projector, and names them.

        Raises:
            FileExistsError: `folder` exists and is not an empty folder.
        """
        self.model.config.parts_from = dict(self.folders) if apart else None
        return save_new(self.model, self.processor, folder)


def compose(
    encoders: str | Path | Mapping[str, str | Path],
    thinker: str | Path,
    projector: str | Mapping[str, str] = "unshuffle_mlp",
    factor: int | Mapping[str, int] | None = None,
    positions: bool = False,
    items: Mapping[str, Sequence[Any]] | None = None,
) -> Composition:
    """Connect encoders to a causal language model, each with a new projector, which writes tokens as large as words.

    Args:
        encoders: for each modality by its name the folder of an encoder with its preprocessor_config.json, or of a model
            that contains the encoder. Or one folder alone, whose encoder tells its modality.
        thinker: folder of the language model with its tokenizer.
        projector: one of `omni.projectors.PROJECTORS`, for all modalities or by name.
        factor: for `unshuffle_mlp`, the patches along each side that become one token, for all modalities or by name. By
            default 2; 3 where 2 does not divide the grid of patches; 1 where neither does.
        positions: whether projectors add learned positions, where a grid has several axes.
        items: for modalities by name some items, by which the projector whitens what it reads; see
            `omni.projectors.Projector`.

    Raises:
        CheckpointError: a folder does not hold what it should, or the parts do not fit together.
        ValueError: a projector is unknown, or a factor does not fit it.
    """
    notes: list[str] = []
    named = encoders.items() if isinstance(encoders, Mapping) else [(None, encoders)]
    kinds = projector.values() if isinstance(projector, Mapping) else [projector]
    if unknown := sorted({*kinds} - {*PROJECTORS}):
        raise ValueError(f"Unknown projector {unknown[0]!r}; known: {', '.join(sorted(PROJECTORS))}.")
    found = {Path(folder): read_encoder(Path(folder), name, notes) for name, folder in named}
    towers = {encoder.modality: encoder for encoder in found.values()}
    for option in (projector, factor):
        if isinstance(option, Mapping) and (strangers := sorted(option.keys() - towers.keys())):
            raise ValueError(f"{strangers[0]!r} is none of the modalities here, which are {', '.join(sorted(towers))}.")
    language_model, tokenizer = read_thinker(Path(thinker), notes)
    probes, sections, grids = [], dict[str, dict[str, Any]](), dict[str, tuple[int, ...]]()
    for folder, encoder in found.items():
        with reading(folder, "The encoder"):
            probe = encoder.probes()[0]
            grids[encoder.modality], output = _look(encoder, probe)
        probes.append(Item(encoder.modality, probe))
        name, whitened = encoder.modality, encoder.modality in (items or {})
        kind = projector.get(name, "unshuffle_mlp") if isinstance(projector, Mapping) else projector
        own = factor.get(name) if isinstance(factor, Mapping) else factor
        sections[name] = _section(encoder, grids[name], output, kind, own, positions, whitened)
    bundles = [encoder.bundle for encoder in towers.values()]
    for bundle in bundles:
        sections[bundle.name]["token_id"] = add_placeholder(bundle, tokenizer, language_model, notes)
    prepare_chats(bundles, tokenizer, notes)
    _agree_on_precision([*(encoder.model for encoder in towers.values()), language_model], notes)
    config = OmniConfig(modalities=sections, text_config=language_model.config)
    sizes = {name: config.num_tokens(name, grid) for name, grid in grids.items()}  # raises if a factor does not divide
    with reading(thinker, "The language model"):
        model = _join(config, towers, language_model)
        _expect_its_words(model, language_model)
        for name, encoder in towers.items():
            if config.modalities[name].get("whitened"):
                _whiten(model, encoder, (items or {})[name])
        _speak_as_loud_as_words(model, {item.modality: item.value for item in probes}, towers)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    preprocessors = {name: encoder.preprocessor for name, encoder in towers.items()}
    processor = OmniProcessor(tokenizer=tokenizer, preprocessors=preprocessors, modalities=config.modalities)
    named_folders = " and ".join(f"the encoder in {str(folder)!r}" for folder in found)
    _try(
        model, processor, probes, f"{named_folders} and the language model in {str(thinker)!r}".replace("the", "The", 1)
    )
    notes += [_note(encoder, config.modalities[name], grids[name], sizes[name]) for name, encoder in towers.items()]
    where = {f"{name}_tower": os.path.abspath(folder) for name, folder in zip(towers, found, strict=True)}
    where["language_model"] = os.path.abspath(thinker)
    return Composition(model, processor, tuple(notes), where)


def _section(
    encoder: Encoder, grid: tuple[int, ...], output: str, kind: str, factor: int | None, positions: bool, whitened: bool
) -> dict[str, Any]:
    """The section of a modality, apart from its placeholder. See `compose` for the defaults."""
    if factor is None:
        fits = [k for k in FACTORS if len(grid) == 1 or not any(side % k for side in grid)]
        factor = fits[0] if fits and PROJECTORS[kind].uses_factor else 1
    section = {"encoder": encoder.model.config, "output": output, "projector": kind, "factor": factor}
    if positions and "grid" in output.split("+") and len(grid) in INTERPOLATIONS:
        section["positions"] = [side // factor for side in grid]
    if whitened and encoder.model.config.hidden_size * factor ** len(grid) <= WIDEST:
        section["whitened"] = True
    return section


def _note(encoder: Encoder, section: Mapping[str, Any], grid: tuple[int, ...], tokens: int) -> str:
    """What a new projector does."""
    what = "places" if len(grid) > 1 else "tokens"
    return (
        f"{encoder.modality}_projector is new: {section['projector']}, factor {section['factor']}; it turns "
        f"{' x '.join(map(str, grid))} {what} of a {encoder.bundle.noun} ({section['output']}) into {tokens} tokens"
    )


def _look(encoder: Encoder, item: Any) -> tuple[tuple[int, ...], str]:
    """The shape of an item's grid of tokens, and the names of the encoder's outputs, such as "cls+grid"."""
    inputs = encoder.prepare([item])
    tokens = encoder.encode(inputs)
    return encoder.grid_shape(inputs), "+".join(name for name in ("cls", "grid") if name in tokens)


# --- Making them fit -------------------------------------------------------------------------------------------------


def _agree_on_precision(parts: Sequence[nn.Module], notes: list[str]) -> None:
    """If the parts differ in precision, let the checkpoint load in a precision that holds every number of both."""
    kinds = {tensor.dtype for part in parts for tensor in part.parameters()}
    if len(kinds) > 1:
        widest = reduce(torch.promote_types, kinds)
        for encoder in parts[:-1]:
            encoder.to(widest)  # a saved configuration names the type of the first part
        notes.append(
            f"the parts differ in precision; the checkpoint loads in {str(widest).removeprefix('torch.')}, which holds all "
            "their numbers, unless dtype=... asks for another"
        )


def _join(config: OmniConfig, towers: Mapping[str, Encoder], language_model: Any) -> OmniForConditionalGeneration:
    """The fused model around all parts. They are not copied."""
    with torch.device("meta"):
        model = OmniForConditionalGeneration(config)
    if type(model.model.language_model) is not type(language_model.base_model):
        raise ValueError(
            f"a {type(language_model).__name__} keeps its decoder elsewhere than omni looks for it; choose another model"
        )
    for name, encoder in towers.items():
        projector = getattr(model.model, f"{name}_projector").to_empty(device="cpu").to(encoder.model.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same parts make the same checkpoint
            for module in projector.modules():
                model._init_weights(module)
        setattr(model.model, f"{name}_tower", encoder.model)
        encoder.model.config.name_or_path = ""  # it names a folder of this machine
    config.text_config.name_or_path = ""
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.generation_config = language_model.generation_config
    model.config.untrained = sorted(f"{name}_projector" for name in towers)
    return model.eval()


@torch.no_grad()
def _expect_its_words(model: OmniForConditionalGeneration, language_model: Any) -> None:
    """Refuse a model that reads words, at once or with a cache, unlike the language model alone."""
    placeholders = {section["token_id"] for section in model.config.modalities.values()}
    words = [i for i in range(len(placeholders) + 6) if i not in placeholders][:6]
    ids, cache = torch.tensor([words]), DynamicCache(config=model.config.text_config)
    expected = language_model(ids).logits[0, -1]
    model(input_ids=ids[:, :-1], use_cache=True, **{CACHE: cache})
    found = model(input_ids=ids[:, -1:], attention_mask=torch.ones_like(ids), **{CACHE: cache}).logits[0, -1]
    rounding = 0.001 if expected.dtype == torch.float32 else 0.05
    if not (found - expected).abs().max() <= rounding * expected.abs().max():
        raise ValueError(
            f"a {type(language_model).__name__} that is given embeddings instead of ids, or a cache, computes other logits; "
            "choose another model"
        )


@torch.no_grad()
def _whiten(model: OmniForConditionalGeneration, encoder: Encoder, items: Sequence[Any]) -> None:
    """Set the whitening of a projector from the tokens of some items."""
    name = encoder.modality
    projector = getattr(model.model, f"{name}_projector")
    read: dict[str, list[torch.Tensor]] = {part: [] for part in projector.whitening}
    watching = [
        layer.register_forward_pre_hook(lambda _, args, part=part: read[part].append(args[0].flatten(0, 1).float()))
        for part, layer in projector.whitening.items()
    ]
    for start in range(0, len(items), AT_ONCE):
        model.model.get_features(name, **encoder.prepare(list(items[start : start + AT_ONCE])))
    for each in watching:
        each.remove()
    for part, found in read.items():
        projector.whitening[part].measure(torch.cat(found))


@torch.no_grad()
def _speak_as_loud_as_words(
    model: OmniForConditionalGeneration, probes: Mapping[str, Any], towers: Mapping[str, Encoder]
) -> None:
    """Let each projector write tokens of the size of embedded words, which some language models multiply."""
    embed = model.get_input_embeddings()
    ids = torch.arange(0, model.config.text_config.vocab_size, max(1, model.config.text_config.vocab_size // WORDS))
    words = _size(embed(ids))
    for name, encoder in towers.items():
        tokens = torch.cat(model.model.get_features(name, **encoder.prepare([probes[name]])).pooler_output)
        _rescale(getattr(model.model, f"{name}_projector"), words / _size(tokens))


def _rescale(projector: Projector, ratio: float) -> None:
    """Multiply what a projector writes: its last layer and its positions."""
    *_, last = (module for module in projector.modules() if isinstance(module, nn.Linear))
    for layer in (last, projector.positions):
        for parameter in layer.parameters() if layer is not None else ():
            parameter.data.mul_(ratio)


def _size(tokens: torch.Tensor) -> float:
    return max(tokens.float().square().mean().sqrt().item(), torch.finfo(torch.float32).eps)


def _try(model: OmniForConditionalGeneration, processor: OmniProcessor, items: Sequence[Item], what: str) -> None:
    """Run the model once on an item of each modality and a word, so that parts that do not work together are refused now."""
    try:
        inputs = make_prompts(processor, [("?", items)])
        limit, found = getattr(model.config.text_config, "max_position_embeddings", None), inputs["input_ids"].shape[1]
        if limit is not None and found >= limit:
            raise ValueError(
                f"a {nouns(items)} and a word are {found} tokens, but the language model takes at most {limit}; choose a "
                "larger factor"
            )
        with torch.inference_mode():
            model(**inputs)
    except Exception as error:  # the code of other packages may raise anything
        raise CheckpointError(f"{what} do not work together: {error}") from error

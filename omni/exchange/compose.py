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

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from omni.checkpoints.fingerprints import naming_weights, verify_weights
from omni.checkpoints.folder import CheckpointError, model_type_of
from omni.data.conversations import ask
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.parts import grow_vocabulary, read_tower
from omni.fusion.processing_omni import OmniProcessor
from omni.grids import INTERPOLATIONS
from omni.items import Item, nouns
from omni.loading.checkpoint import save_new
from omni.loading.encoder import Encoder, find_encoder
from omni.loading.preprocessor import load_preprocessor
from omni.modality import Modality
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

AS_TEXT = (
    "{%- set placeholders = PLACEHOLDERS -%}"
    "{%- set turned = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or message['content'] is not iterable -%}"
    "{%- set turned.messages = turned.messages + [message] -%}"
    "{%- else -%}"
    "{%- set turned.text = '' -%}"
    "{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'text' -%}{%- set turned.text = turned.text + block['text'] -%}"
    "{%- elif block['type'] in placeholders -%}{%- set turned.text = turned.text + placeholders[block['type']] -%}"
    "{%- else -%}"
    "{{- raise_exception('Blocks are text and ' ~ (placeholders | join(' and ')) ~ ', found ' ~ block['type']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set turned.messages = turned.messages + [dict(message, content=turned.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = turned.messages %}"
)
"""Lines in front of a chat template that reads text alone. They turn blocks of text and items into text."""

PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- else -%}{{- message['role'] | capitalize + ': ' + message['content'] + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
"""The chat template for a language model without one."""


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
    found = {Path(folder): _read_encoder(Path(folder), name, notes) for name, folder in named}
    towers = {encoder.modality: encoder for encoder in found.values()}
    for option in (projector, factor):
        if isinstance(option, Mapping) and (strangers := sorted(option.keys() - towers.keys())):
            raise ValueError(f"{strangers[0]!r} is none of the modalities here, which are {', '.join(sorted(towers))}.")
    language_model, tokenizer = _read_thinker(Path(thinker), notes)
    probes, sections, grids = [], dict[str, dict[str, Any]](), dict[str, tuple[int, ...]]()
    for folder, encoder in found.items():
        with _reading(folder, "The encoder"):
            probe = encoder.probes()[0]
            grids[encoder.modality], output = _look(encoder, probe)
        probes.append(Item(encoder.modality, probe))
        section = {"encoder": encoder.model.config, "output": output}
        section |= _projector(encoder.modality, grids[encoder.modality], projector, factor)
        if positions and "grid" in output.split("+") and len(grids[encoder.modality]) in INTERPOLATIONS:
            section["positions"] = [side // section["factor"] for side in grids[encoder.modality]]
        width = encoder.model.config.hidden_size * section["factor"] ** len(grids[encoder.modality])
        if encoder.modality in (items or {}) and width <= WIDEST:
            section["whitened"] = True
        sections[encoder.modality] = section
    bundles = [encoder.bundle for encoder in towers.values()]
    for bundle in bundles:
        sections[bundle.name]["token_id"] = _add_placeholder(bundle, tokenizer, language_model, notes)
    _prepare_chats(bundles, tokenizer, notes)
    _agree_on_precision([*(encoder.model for encoder in towers.values()), language_model], notes)
    config = OmniConfig(modalities=sections, text_config=language_model.config)
    sizes = {name: config.num_tokens(name, grid) for name, grid in grids.items()}  # raises if a factor does not divide
    with _reading(thinker, "The language model"):
        model = _join(config, towers, language_model)
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
    for name, encoder in towers.items():
        section = config.modalities[name]
        what = "places" if len(grids[name]) > 1 else "tokens"
        notes.append(
            f"{name}_projector is new: {section['projector']}, factor {section['factor']}; it turns "
            f"{' x '.join(map(str, grids[name]))} {what} of a {encoder.bundle.noun} ({section['output']}) into "
            f"{sizes[name]} tokens"
        )
    where = {f"{name}_tower": os.path.abspath(folder) for name, folder in zip(towers, found, strict=True)}
    where["language_model"] = os.path.abspath(thinker)
    return Composition(model, processor, tuple(notes), where)


def _projector(
    name: str,
    grid_shape: tuple[int, ...],
    projector: str | Mapping[str, str],
    factor: int | Mapping[str, int] | None,
) -> dict[str, Any]:
    """The settings of a modality's projector for its section."""
    kind = projector.get(name, "unshuffle_mlp") if isinstance(projector, Mapping) else projector
    own = factor.get(name) if isinstance(factor, Mapping) else factor
    if own is None:
        fits = [k for k in FACTORS if len(grid_shape) == 1 or not any(side % k for side in grid_shape)]
        own = fits[0] if fits and PROJECTORS[kind].uses_factor else 1
    return {"projector": kind, "factor": own}


# --- The folders ------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(folder: str | Path, what: str) -> Iterator[None]:
    """Turn any error that a model of another package raises inside into a `CheckpointError` that names its folder."""
    try:
        with naming_weights(folder):
            yield
    except CheckpointError:
        raise
    except (ValueError, OSError, RuntimeError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{what} in {str(folder)!r} cannot be used: {error}") from error
    except (SafetensorError, StrictDataclassError) as error:
        raise CheckpointError(f"{what} in {str(folder)!r} is damaged ({error}); get the folder again.") from error


def _read_encoder(folder: Path, name: str | None, notes: list[str]) -> Encoder:
    """The encoder of a modality in a folder, with its preprocessor."""
    model_type_of(folder)
    with _reading(folder, "The encoder"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        bundle, part = find_encoder(config, name)
        model, info = read_tower(bundle, folder, part, use_safetensors=True)
        cls, others = type(model), sorted(info["unexpected_keys"])
        alone = part is config and cls.__name__ in (config.architectures or [cls.__name__])
        _expect_whole(folder, cls, info, others if alone else [])
        verify_weights(folder)
        size = sum(parameter.numel() for parameter in model.parameters())
        note = f"{bundle.name}_tower is the {model.config.model_type} in {str(folder)!r}, {size:,} parameters"
        notes.append(note + (f"; its {len(others)} other tensors are left out" if others else ""))
        return Encoder(model.eval(), load_preprocessor(bundle, folder), modality=bundle.name)


def _read_thinker(folder: Path, notes: list[str]) -> tuple[Any, Any]:
    """The causal language model in a folder, and its tokenizer."""
    model_type = model_type_of(folder)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(
            f"{str(folder)!r} holds a model of type {model_type!r}, which is no causal language model; name the folder of "
            "one, such as Llama, Qwen3 or GPT-2."
        )
    with _reading(folder, "The language model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.get_text_config() is not config:
            raise CheckpointError(
                f"{str(folder)!r} holds a {model_type!r}, a model of several parts; expected a language model alone."
            )
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        _expect_whole(folder, type(model), info, sorted(info["unexpected_keys"]))
        if not _reads_forward_only(model):
            raise CheckpointError(
                f"The {type(model).__name__} in {str(folder)!r} looks at later words; expected a causal language model, "
                "which looks only at earlier ones."
            )
    with _reading(folder, "The tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rows, last = len(model.get_input_embeddings().weight), max(tokenizer.get_vocab().values())
    if last >= rows:
        raise CheckpointError(
            f"In {str(folder)!r} the tokenizer has ids up to {last}, but the model has only {rows} embeddings; save the "
            "tokenizer of this model there."
        )
    if tokenizer.eos_token is None:
        raise CheckpointError(
            f"The tokenizer in {str(folder)!r} has no end-of-text token, so an answer would never end; set its eos_token."
        )
    size = sum(parameter.numel() for parameter in model.parameters())
    notes.append(f"language_model is the {model_type} in {str(folder)!r}, {size:,} parameters")
    return model.eval(), tokenizer


def _expect_whole(folder: Path, cls: type, info: Mapping[str, Any], left_over: list[str]) -> None:
    """Refuse weights that lack a tensor of the class, or have one that the class does not know or that has another shape."""
    problems = [f"missing: {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unexpected: {name}" for name in left_over]
    problems += [f"of another shape: {name}" for name, *_ in sorted(info["mismatched_keys"])]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"The weights in {str(folder)!r} are not those of a {cls.__name__} ({', '.join(problems[:5])}{more}); name a "
            "folder that save_pretrained of this class wrote."
        )


def _reads_forward_only(model: Any) -> bool:
    """Whether the logits after a word are independent of the later words. Their gradient tells."""
    ids = torch.arange(3)[None]
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        said = model(inputs_embeds=embedded).logits[0, 0].float().square().sum()
        (gradient,) = torch.autograd.grad(said, embedded)
    return not gradient[0, 1:].any()


def _look(encoder: Encoder, item: Any) -> tuple[tuple[int, ...], str]:
    """The shape of an item's grid of tokens, and the names of the encoder's outputs, such as "cls+grid"."""
    inputs = encoder.prepare([item])
    tokens = encoder.encode(inputs)
    return encoder.grid_shape(inputs), "+".join(name for name in ("cls", "grid") if name in tokens)


# --- Making them fit -------------------------------------------------------------------------------------------------


def _add_placeholder(modality: Modality, tokenizer: Any, model: Any, notes: list[str]) -> int:
    """The id of a modality's placeholder. A tokenizer without one gets it; all other ids stay."""
    token = modality.token
    before = tokenizer.get_vocab()
    if tokenizer.encode(token, add_special_tokens=False) == [before.get(token)]:
        notes.append(f"the tokenizer has {token} already, id {before[token]}")
        return int(before[token])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(token)
    after = tokenizer.get_vocab()
    assert after == {**before, token: token_id}
    assert token_id not in before.values()
    rows = len(model.get_input_embeddings().weight)
    if token_id < rows:
        notes.append(f"the tokenizer gets {token} as id {token_id}, which was free among {rows:,} embeddings")
    else:
        grow_vocabulary(model, token_id + 1)
        notes.append(f"the tokenizer gets {token} as id {token_id}; the {rows:,} embeddings grow to {token_id + 1:,}")
    return int(token_id)


def _prepare_chats(bundles: Sequence[Modality], tokenizer: Any, notes: list[str]) -> None:
    """Make sure that the chat template takes items, and that the tokenizer can pad."""
    tokens = " and ".join(bundle.token for bundle in bundles)
    as_text = AS_TEXT.replace("PLACEHOLDERS", json.dumps({bundle.name: bundle.token for bundle in bundles}))
    if tokenizer.chat_template is None:
        begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = as_text + ("{{- bos_token -}}" if begins else "") + PLAIN
        notes.append(
            "the tokenizer had no chat template; it writes questions as `User: ...` and answers as `Assistant: ...`"
        )
    elif _holds_items(bundles, tokenizer):
        notes.append("the chat template is kept")
    else:
        tokenizer.chat_template = as_text + tokenizer.get_chat_template()
        if not _holds_items(bundles, tokenizer):
            raise CheckpointError(
                f"Expected a chat template that writes {tokens} and then the question, once each; the tokenizer's does not, "
                "so correct it."
            )
        notes.append(f"the chat template takes text alone, so lines in front of it turn items into {tokens}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer had no padding token; it pads with {tokenizer.eos_token}")


def _holds_items(bundles: Sequence[Modality], tokenizer: Any) -> bool:
    """Whether the chat template writes a placeholder for an item of each modality, and then the question."""
    question, tokens = "What is it?", [bundle.token for bundle in bundles]
    try:
        asked = ask(question, items=[bundle.name for bundle in bundles])
        written = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a program, and may raise anything on contents that it was not written for
        return False
    parts = [*tokens, question]
    places = [written.find(part) for part in parts]
    return all(written.count(part) == 1 for part in parts) and places == sorted(places)


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

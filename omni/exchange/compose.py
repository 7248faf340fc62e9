"""Compose: a fused model of an encoder and a causal language model that exist already, each in a folder of its own.

    encoder (CLIP, SigLIP, DINOv2, ViT, ours; of a model of several parts the one that sees) ─▶ image_tower, as it is
    any causal language model, with its tokenizer and chat template ─▶ language_model and lm_head, as they are
    image_projector: new, so untrained

    composition = compose("clip-vit-base-patch16", "Qwen2.5-0.5B-Instruct")
    composition.save("mine")

Both parts must fit as they are, or it is said why not: tensors that are missing or left over, an encoder of something
else, a language model that looks ahead, a prompt that cannot hold a picture. Whatever had to be settled is a note.
"""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import AddedToken, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from omni.checkpoints.fingerprints import verify_weights
from omni.checkpoints.strict import CheckpointError
from omni.data.conversations import ask
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.loading.checkpoint import model_type_of
from omni.projectors import PROJECTORS
from omni.registry import get_modality
from omni.session import make_prompts

FACTORS = (2, 3)
"""How many patches along each side a projector folds into one token, if it folds; the first that divides the grid."""

AS_TEXT = (
    "{%- set turned = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or message['content'] is not iterable -%}"
    "{%- set turned.messages = turned.messages + [message] -%}"
    "{%- else -%}"
    "{%- set turned.text = '' -%}"
    "{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'text' -%}{%- set turned.text = turned.text + block['text'] -%}"
    "{%- elif block['type'] == 'image' -%}{%- set turned.text = turned.text + 'PLACEHOLDER' -%}"
    "{%- else -%}{{- raise_exception('Blocks are text and image, found ' + block['type']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set turned.messages = turned.messages + [dict(message, content=turned.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = turned.messages %}"
)
"""Put before a chat template that reads text alone: blocks of text and pictures become text first."""

PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- else -%}{{- message['role'] | capitalize + ': ' + message['content'] + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
"""The chat template of a language model that has none."""


@dataclass(frozen=True)
class Composition:
    """What `compose` made.

    Attributes:
        model: the fused model; its `config.untrained` names the projector.
        processor: its processor.
        notes: what was settled on the way, a sentence each.
    """

    model: OmniForConditionalGeneration
    processor: OmniProcessor
    notes: tuple[str, ...]

    def save(self, folder: str | Path) -> Path:
        """Write the checkpoint, whole or not at all.

        Raises:
            FileExistsError: something is there already.
        """
        folder = expect_new(folder)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        self.model.save_pretrained(unfinished)
        self.processor.save_pretrained(unfinished)
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
        return folder


def expect_new(folder: str | Path) -> Path:
    """The folder, if a checkpoint can be written there without replacing anything.

    Raises:
        FileExistsError: something is there already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} exists already; name a new folder, or remove it first.")
    return folder


def compose(
    image: str | Path, thinker: str | Path, projector: str = "unshuffle_mlp", factor: int | None = None
) -> Composition:
    """Join an encoder of pictures and a causal language model by a new projector.

    Args:
        image: folder of the encoder with its preprocessor_config.json, or of a model that it is a part of.
        thinker: folder of the language model with its tokenizer.
        projector: one of `omni.projectors.PROJECTORS`.
        factor: for `unshuffle_mlp`, patches along each side that become one token; by default 2, or 3 where 2 does not
            divide the grid of patches, or else 1.

    Raises:
        CheckpointError: a folder that is not what it should be, or two that do not fit together.
        ValueError: an unknown projector, or a factor that does not fit it.
    """
    notes: list[str] = []
    picture = Image.new("RGB", (64, 48), "gray")
    if projector not in PROJECTORS:
        raise ValueError(f"Unknown projector {projector!r}; known: {', '.join(sorted(PROJECTORS))}.")
    encoder, preprocessor = _read_encoder(Path(image), notes)
    language_model, tokenizer = _read_thinker(Path(thinker), notes)
    with _reading(image, "The encoder"):
        grid_shape, output = _look(encoder, preprocessor, picture)
    token_id = _add_placeholder(tokenizer, language_model, notes)
    _prepare_chats(tokenizer, notes)
    _agree_on_precision(encoder, language_model, notes)
    if factor is None:
        folds = PROJECTORS[projector].uses_factor
        factor = next((k for k in FACTORS if folds and not any(side % k for side in grid_shape)), 1)
    section = {"encoder": encoder.config, "token_id": token_id, "output": output}
    config = OmniConfig(
        modalities={"image": {**section, "projector": projector, "factor": factor}}, text_config=language_model.config
    )
    config.num_tokens("image", grid_shape)  # a factor that does not divide the grid is an error of its own
    with _reading(thinker, "The language model"):
        model = _join(config, encoder, language_model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = OmniProcessor(preprocessor, tokenizer, modalities=config.modalities)
    _try(model, processor, picture, f"The encoder in {str(image)!r} and the language model in {str(thinker)!r}")
    patches = " x ".join(map(str, grid_shape))
    notes.append(
        f"image_projector is new: {projector}, factor {factor}; {patches} patches of a picture ({output}) become "
        f"{config.num_tokens('image', grid_shape)} tokens"
    )
    return Composition(model, processor, tuple(notes))


# --- The two folders --------------------------------------------------------------------------------------------------


@contextmanager
def _reading(folder: str | Path, what: str) -> Iterator[None]:
    """Inside, whatever a stranger's model raises means that its folder cannot be used."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, OSError, RuntimeError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{what} in {str(folder)!r} cannot be used: {error}") from error
    except (SafetensorError, StrictDataclassError) as error:
        raise CheckpointError(f"{what} in {str(folder)!r} is damaged ({error}); get the folder again.") from error


def _read_encoder(folder: Path, notes: list[str]) -> tuple[Any, Any]:
    """The encoder of pictures in a folder, and what prepares pictures for it."""
    model_type = model_type_of(folder)
    with _reading(folder, "The encoder"):
        config = AutoConfig.from_pretrained(folder)
        part = getattr(config, "vision_config", config)
        with torch.device("meta"):
            cls = type(AutoModel.from_config(part))
        if cls.main_input_name != "pixel_values":
            raise CheckpointError(
                f"{str(folder)!r} holds a model of type {model_type!r}, which reads {cls.main_input_name}; expected an "
                "encoder of pictures, such as CLIP, SigLIP, DINOv2 or ViT."
            )
        encoder, report = cls.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        others = sorted(report["unexpected_keys"])
        alone = part is config and cls.__name__ in (config.architectures or [cls.__name__])
        _expect_whole(folder, cls, report, others if alone else [])
        verify_weights(folder)
        size = sum(parameter.numel() for parameter in encoder.parameters())
        note = f"image_tower is the {encoder.config.model_type} in {str(folder)!r}, {size:,} parameters"
        notes.append(note + (f"; its {len(others)} other tensors are left out" if others else ""))
        if (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file():
            return encoder.eval(), AutoImageProcessor.from_pretrained(folder)
        raise CheckpointError(
            f"{str(folder)!r} has no preprocessor_config.json, so how its pictures are to be prepared is not known; save "
            "the encoder's image processor into it."
        )


def _read_thinker(folder: Path, notes: list[str]) -> tuple[Any, Any]:
    """The causal language model in a folder, and its tokenizer."""
    model_type = model_type_of(folder)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(
            f"{str(folder)!r} holds a model of type {model_type!r}, which is no causal language model; expected one, such "
            "as Llama, Qwen3 or GPT-2."
        )
    with _reading(folder, "The language model"):
        config = AutoConfig.from_pretrained(folder)
        if config.get_text_config() is not config:
            raise CheckpointError(
                f"{str(folder)!r} holds a {model_type!r}, a model of several parts; expected a language model alone."
            )
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        _expect_whole(folder, type(model), report, sorted(report["unexpected_keys"]))
        if not _reads_forward_only(model):
            raise CheckpointError(
                f"The {type(model).__name__} in {str(folder)!r} looks at words that come later; expected a causal language "
                "model, which writes from left to right."
            )
    with _reading(folder, "The tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, last = len(model.get_input_embeddings().weight), max(tokenizer.get_vocab().values())
    if last >= rows:
        raise CheckpointError(
            f"In {str(folder)!r} the tokenizer has ids up to {last}, but the model only {rows} embeddings; they do not "
            "belong together."
        )
    if tokenizer.eos_token is None:
        raise CheckpointError(
            f"The tokenizer in {str(folder)!r} has no end-of-text token, so an answer would never end; set eos_token."
        )
    size = sum(parameter.numel() for parameter in model.parameters())
    notes.append(f"language_model is the {model_type} in {str(folder)!r}, {size:,} parameters")
    return model.eval(), tokenizer


def _expect_whole(folder: Path, cls: type, report: Mapping[str, Any], left_over: list[str]) -> None:
    """Refuse a model of which something would be random, or which its class does not know entirely."""
    problems = [f"missing: {name}" for name in sorted(report["missing_keys"])]
    problems += [f"unexpected: {name}" for name in left_over]
    problems += [f"of another shape: {name}" for name, *_ in sorted(report["mismatched_keys"])]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"The weights in {str(folder)!r} are not those of a {cls.__name__}; {', '.join(problems[:5])}{more}. Name the "
            "folder of such a model as it was saved."
        )


def _reads_forward_only(model: Any) -> bool:
    """Whether what the model says after a word does not depend on the words after it, told by the gradient."""
    ids = torch.arange(3)[None]
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        said = model(inputs_embeds=embedded).logits[0, 0].float().square().sum()
        (gradient,) = torch.autograd.grad(said, embedded)
    return not gradient[0, 1:].any()


@torch.no_grad()
def _look(encoder: Any, preprocessor: Any, picture: Image.Image) -> tuple[tuple[int, ...], str]:
    """The grid of a picture's patches, and which named outputs the encoder has, such as "cls+grid"."""
    modality = get_modality("image")
    pixel_values = preprocessor([picture], return_tensors="pt")["pixel_values"]
    (shape,) = modality.grid_shapes(encoder.config, {"pixel_values": pixel_values})
    encoded = encoder(pixel_values=pixel_values.to(encoder.dtype), return_dict=True)
    tokens = modality.read(encoded, math.prod(shape))
    return tuple(shape), "+".join(name for name in ("cls", "grid") if name in tokens)


# --- What has to be settled between them ------------------------------------------------------------------------------


def _add_placeholder(tokenizer: Any, model: Any, notes: list[str]) -> int:
    """The id of the placeholder of pictures, which the tokenizer gets if it has none; no other id moves."""
    token = get_modality("image").token
    before = tokenizer.get_vocab()
    if tokenizer.encode(token, add_special_tokens=False) == [before.get(token)]:
        notes.append(f"{token} is known to the tokenizer, id {before[token]}")
        return int(before[token])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(token)
    after = tokenizer.get_vocab()
    assert after == {**before, token: token_id}
    assert token_id not in before.values()
    rows = len(model.get_input_embeddings().weight)
    if token_id < rows:
        notes.append(f"{token} is new to the tokenizer, id {token_id}, one of {rows:,} embeddings that was free")
    else:
        model.resize_token_embeddings(token_id + 1, mean_resizing=False)
        notes.append(f"{token} is new to the tokenizer, id {token_id}; the embeddings grew from {rows:,} rows by it")
    return int(token_id)


def _prepare_chats(tokenizer: Any, notes: list[str]) -> None:
    """Make sure that chats can be written, with pictures in them, and that rows of them can be padded."""
    token = get_modality("image").token
    as_text = AS_TEXT.replace("PLACEHOLDER", token)
    if tokenizer.chat_template is None:
        begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = as_text + ("{{- bos_token -}}" if begins else "") + PLAIN
        notes.append(
            "there was no chat template; questions are now written as `User: ...`, answers as `Assistant: ...`"
        )
    elif _holds_pictures(tokenizer):
        notes.append("the chat template is kept")
    else:
        tokenizer.chat_template = as_text + tokenizer.get_chat_template()
        if not _holds_pictures(tokenizer):
            raise CheckpointError(
                f"The chat template of the tokenizer does not write a question as it is, nor {token} before it; correct it."
            )
        notes.append(
            f"the chat template takes text alone; pictures become {token} before it, what it writes is the same"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer had no token for padding, and now pads with {tokenizer.eos_token}")


def _holds_pictures(tokenizer: Any) -> bool:
    """Whether the chat template writes a placeholder for a picture, and the question after it."""
    question, token = "What is it?", get_modality("image").token
    try:
        written = tokenizer.apply_chat_template(ask(question), tokenize=False, add_generation_prompt=True)
    except Exception:  # it is a program, and may do anything with what it was not written for
        return False
    return bool(written.count(token) == written.count(question) == 1 and written.index(token) < written.index(question))


def _agree_on_precision(encoder: nn.Module, language_model: nn.Module, notes: list[str]) -> None:
    """One precision to load the checkpoint in, in which every number of both is what it was."""
    kinds = [{tensor.dtype for tensor in part.parameters()} for part in (encoder, language_model)]
    if len(set.union(*kinds)) > 1:
        widest = reduce(torch.promote_types, set.union(*kinds))
        encoder.to(widest)  # a saved configuration names the type of the first part
        notes.append(
            f"the parts are of different precision; the checkpoint loads in {str(widest).removeprefix('torch.')}, where all "
            "numbers are what they were, or in what dtype=... says"
        )


def _join(config: OmniConfig, encoder: nn.Module, language_model: Any) -> OmniForConditionalGeneration:
    """The fused model around both parts, which are not copied."""
    with torch.device("meta"):
        model = OmniForConditionalGeneration(config)
    if type(model.model.language_model) is not type(language_model.base_model):
        raise ValueError(f"{type(language_model).__name__} keeps its decoder where it is not looked for.")
    projector = model.model.image_projector.to_empty(device="cpu").to(next(encoder.parameters()).dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same parts make the same checkpoint
        for module in projector.modules():
            model._init_weights(module)
    for part in (config.image_config, config.text_config):
        part.name_or_path = ""  # a folder of this machine
    model.model.image_tower, model.model.language_model = encoder, language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.generation_config = language_model.generation_config
    model.config.untrained = ["image_projector"]
    return model.eval()


def _try(model: OmniForConditionalGeneration, processor: OmniProcessor, picture: Image.Image, what: str) -> None:
    """Ask something about a picture, so that what cannot work is said now."""
    try:
        inputs = make_prompts(processor, [("?", [picture])])
        limit, found = getattr(model.config.text_config, "max_position_embeddings", None), inputs["input_ids"].shape[1]
        if limit is not None and found >= limit:
            raise ValueError(
                f"a picture and a word are {found} tokens, and the language model takes {limit}; choose a projector with "
                "a larger factor"
            )
        with torch.inference_mode():
            model(**inputs)
    except Exception as error:  # of their own code, so anything
        raise CheckpointError(f"{what} do not work together: {error}") from error

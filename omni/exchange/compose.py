"""Compose a fused model of an encoder and a causal language model, each from a folder of its own.

    encoder (CLIP, SigLIP, DINOv2, ViT, omni's own)            ─▶ image_tower, unchanged
    any causal language model, its tokenizer and chat template ─▶ language_model and lm_head, unchanged
                                                                  image_projector: new and untrained

    composition = compose("clip-vit-base-patch16", "Qwen2.5-0.5B-Instruct")
    composition.save("mine")

From a model of several parts, such as CLIP, the vision part is taken. Parts that do not fit are refused, with the reason:
tensors are missing or left over, the encoder does not read pictures, the language model is not causal, or its prompts
cannot hold a picture. Every choice that was made on the way is a note.
"""

import math
import os
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
from omni.checkpoints.folder import CheckpointError, model_type_of
from omni.data.conversations import ask
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.parts import grow_vocabulary
from omni.fusion.processing_omni import OmniProcessor
from omni.loading.checkpoint import save_new
from omni.projectors import PROJECTORS
from omni.registry import get_modality
from omni.session import make_prompts

FACTORS = (2, 3)
"""Patches along each side that `unshuffle_mlp` folds into one token. The first of these that divides the grid is taken."""

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
"""Lines in front of a chat template that reads text alone. They turn blocks of text and pictures into text."""

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
    """What `compose` made.

    Attributes:
        model: the fused model; its `config.untrained` names the projector.
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
    image: str | Path, thinker: str | Path, projector: str = "unshuffle_mlp", factor: int | None = None
) -> Composition:
    """Connect a vision encoder to a causal language model with a new projector.

    Args:
        image: folder of the encoder with its preprocessor_config.json, or of a model that contains the encoder.
        thinker: folder of the language model with its tokenizer.
        projector: one of `omni.projectors.PROJECTORS`.
        factor: for `unshuffle_mlp`, the patches along each side that become one token. By default 2; 3 where 2 does not
            divide the grid of patches; 1 where neither does.

    Raises:
        CheckpointError: a folder does not hold what it should, or the two do not fit together.
        ValueError: the projector is unknown, or the factor does not fit it.
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
    config.num_tokens("image", grid_shape)  # raises its own error if the factor does not divide the grid
    with _reading(thinker, "The language model"):
        model = _join(config, encoder, language_model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = OmniProcessor(preprocessor, tokenizer, modalities=config.modalities)
    _try(model, processor, picture, f"The encoder in {str(image)!r} and the language model in {str(thinker)!r}")
    patches = " x ".join(map(str, grid_shape))
    notes.append(
        f"image_projector is new: {projector}, factor {factor}; it turns {patches} patches of a picture ({output}) into "
        f"{config.num_tokens('image', grid_shape)} tokens"
    )
    folders = {"image_tower": os.path.abspath(image), "language_model": os.path.abspath(thinker)}
    return Composition(model, processor, tuple(notes), folders)


# --- The two folders --------------------------------------------------------------------------------------------------


@contextmanager
def _reading(folder: str | Path, what: str) -> Iterator[None]:
    """Turn any error that a model of another package raises inside into a `CheckpointError` that names its folder."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, OSError, RuntimeError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{what} in {str(folder)!r} cannot be used: {error}") from error
    except (SafetensorError, StrictDataclassError) as error:
        raise CheckpointError(f"{what} in {str(folder)!r} is damaged ({error}); get the folder again.") from error


def _read_encoder(folder: Path, notes: list[str]) -> tuple[Any, Any]:
    """The vision encoder in a folder, and its image processor."""
    model_type = model_type_of(folder)
    with _reading(folder, "The encoder"):
        config = AutoConfig.from_pretrained(folder)
        part = getattr(config, "vision_config", config)
        with torch.device("meta"):
            cls = type(AutoModel.from_config(part))
        if cls.main_input_name != "pixel_values":
            raise CheckpointError(
                f"{str(folder)!r} holds a model of type {model_type!r}, which reads {cls.main_input_name}; expected a "
                "vision encoder, such as CLIP, SigLIP, DINOv2 or ViT."
            )
        encoder, info = cls.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        others = sorted(info["unexpected_keys"])
        alone = part is config and cls.__name__ in (config.architectures or [cls.__name__])
        _expect_whole(folder, cls, info, others if alone else [])
        verify_weights(folder)
        size = sum(parameter.numel() for parameter in encoder.parameters())
        note = f"image_tower is the {encoder.config.model_type} in {str(folder)!r}, {size:,} parameters"
        notes.append(note + (f"; its {len(others)} other tensors are left out" if others else ""))
        if (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file():
            return encoder.eval(), AutoImageProcessor.from_pretrained(folder)
        raise CheckpointError(
            f"{str(folder)!r} has no preprocessor_config.json, which says how pictures are prepared; save the encoder's "
            "image processor into it."
        )


def _read_thinker(folder: Path, notes: list[str]) -> tuple[Any, Any]:
    """The causal language model in a folder, and its tokenizer."""
    model_type = model_type_of(folder)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(
            f"{str(folder)!r} holds a model of type {model_type!r}, which is no causal language model; name the folder of "
            "one, such as Llama, Qwen3 or GPT-2."
        )
    with _reading(folder, "The language model"):
        config = AutoConfig.from_pretrained(folder)
        if config.get_text_config() is not config:
            raise CheckpointError(
                f"{str(folder)!r} holds a {model_type!r}, a model of several parts; expected a language model alone."
            )
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        _expect_whole(folder, type(model), info, sorted(info["unexpected_keys"]))
        if not _reads_forward_only(model):
            raise CheckpointError(
                f"The {type(model).__name__} in {str(folder)!r} looks at later words; expected a causal language model, "
                "which looks only at earlier ones."
            )
    with _reading(folder, "The tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
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


@torch.no_grad()
def _look(encoder: Any, preprocessor: Any, picture: Image.Image) -> tuple[tuple[int, ...], str]:
    """The shape of a picture's grid of patches, and the names of the encoder's outputs, such as "cls+grid"."""
    modality = get_modality("image")
    pixel_values = preprocessor([picture], return_tensors="pt")["pixel_values"]
    (shape,) = modality.grid_shapes(encoder.config, {"pixel_values": pixel_values})
    encoded = encoder(pixel_values=pixel_values.to(encoder.dtype), return_dict=True)
    tokens = modality.read(encoded, math.prod(shape))
    return tuple(shape), "+".join(name for name in ("cls", "grid") if name in tokens)


# --- Making the two fit -----------------------------------------------------------------------------------------------


def _add_placeholder(tokenizer: Any, model: Any, notes: list[str]) -> int:
    """The id of the pictures' placeholder. A tokenizer without one gets it; all other ids stay."""
    token = get_modality("image").token
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


def _prepare_chats(tokenizer: Any, notes: list[str]) -> None:
    """Make sure that the chat template takes pictures, and that the tokenizer can pad."""
    token = get_modality("image").token
    as_text = AS_TEXT.replace("PLACEHOLDER", token)
    if tokenizer.chat_template is None:
        begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = as_text + ("{{- bos_token -}}" if begins else "") + PLAIN
        notes.append(
            "the tokenizer had no chat template; it writes questions as `User: ...` and answers as `Assistant: ...`"
        )
    elif _holds_pictures(tokenizer):
        notes.append("the chat template is kept")
    else:
        tokenizer.chat_template = as_text + tokenizer.get_chat_template()
        if not _holds_pictures(tokenizer):
            raise CheckpointError(
                f"Expected a chat template that writes {token} and then the question, once each; the tokenizer's does not, "
                "so correct it."
            )
        notes.append(f"the chat template takes text alone, so lines in front of it turn pictures into {token}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer had no padding token; it pads with {tokenizer.eos_token}")


def _holds_pictures(tokenizer: Any) -> bool:
    """Whether the chat template writes a placeholder for a picture, and then the question."""
    question, token = "What is it?", get_modality("image").token
    try:
        written = tokenizer.apply_chat_template(ask(question), tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a program, and may raise anything on contents that it was not written for
        return False
    return bool(written.count(token) == written.count(question) == 1 and written.index(token) < written.index(question))


def _agree_on_precision(encoder: nn.Module, language_model: nn.Module, notes: list[str]) -> None:
    """Where the parts differ in precision, have the checkpoint load in one that holds every number of both."""
    kinds = [{tensor.dtype for tensor in part.parameters()} for part in (encoder, language_model)]
    if len(set.union(*kinds)) > 1:
        widest = reduce(torch.promote_types, set.union(*kinds))
        encoder.to(widest)  # a saved configuration names the type of the first part
        notes.append(
            f"the parts differ in precision; the checkpoint loads in {str(widest).removeprefix('torch.')}, which holds all "
            "their numbers, unless dtype=... asks for another"
        )


def _join(config: OmniConfig, encoder: nn.Module, language_model: Any) -> OmniForConditionalGeneration:
    """The fused model around both parts. They are not copied."""
    with torch.device("meta"):
        model = OmniForConditionalGeneration(config)
    if type(model.model.language_model) is not type(language_model.base_model):
        raise ValueError(
            f"a {type(language_model).__name__} keeps its decoder elsewhere than omni looks for it; choose another model"
        )
    projector = model.model.image_projector.to_empty(device="cpu").to(next(encoder.parameters()).dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same parts make the same checkpoint
        for module in projector.modules():
            model._init_weights(module)
    for part in (config.image_config, config.text_config):
        part.name_or_path = ""  # it names a folder of this machine
    model.model.image_tower, model.model.language_model = encoder, language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.generation_config = language_model.generation_config
    model.config.untrained = ["image_projector"]
    return model.eval()


def _try(model: OmniForConditionalGeneration, processor: OmniProcessor, picture: Image.Image, what: str) -> None:
    """Run the model once on a picture and a word, so that parts that do not work together are refused now."""
    try:
        inputs = make_prompts(processor, [("?", [picture])])
        limit, found = getattr(model.config.text_config, "max_position_embeddings", None), inputs["input_ids"].shape[1]
        if limit is not None and found >= limit:
            raise ValueError(
                f"a picture and a word are {found} tokens, but the language model takes at most {limit}; choose a larger "
                "factor"
            )
        with torch.inference_mode():
            model(**inputs)
    except Exception as error:  # the code of other packages may raise anything
        raise CheckpointError(f"{what} do not work together: {error}") from error

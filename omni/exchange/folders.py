"""Read the parts of a composition: an encoder, or a causal language model with its tokenizer, each from a folder.

A folder whose tensors are missing, left over or of another shape is refused; so is a language model that is not causal.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from omni.checkpoints.fingerprints import naming_weights, verify_weights
from omni.checkpoints.folder import CheckpointError, model_type_of
from omni.fusion.parts import read_tower
from omni.loading.encoder import Encoder, find_encoder
from omni.loading.preprocessor import load_preprocessor


@contextmanager
def reading(folder: str | Path, what: str) -> Iterator[None]:
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


def read_encoder(folder: Path, name: str | None, notes: list[str]) -> Encoder:
    """The encoder of a modality in a folder, with its preprocessor."""
    model_type_of(folder)
    with reading(folder, "The encoder"):
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


def read_thinker(folder: Path, notes: list[str]) -> tuple[Any, Any]:
    """The causal language model in a folder, and its tokenizer."""
    model_type = model_type_of(folder)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(
            f"{str(folder)!r} holds a model of type {model_type!r}, which is no causal language model; name the folder of "
            "one, such as Llama, Qwen3 or GPT-2."
        )
    with reading(folder, "The language model"):
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
    with reading(folder, "The tokenizer"):
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

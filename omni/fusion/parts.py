"""Parts of a fused model whose weights are in folders of their own.

A checkpoint with a new projector need not copy the language model. It may hold only the trained parts, a few megabytes, and
name the folders of the others under `parts_from`:

    {"parts_from": {"language_model": "../SmolLM2-135M-Instruct", "image_tower": "../vision_tiny"}}

Paths are relative to the checkpoint. The configuration holds the fingerprints of all parts, so other weights are refused.
"""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from omni.checkpoints.fingerprints import fingerprint_parts, naming_weights, read_tensors, weights_file
from omni.checkpoints.folder import CONFIG, CheckpointError, named, read_object, reason_of
from omni.checkpoints.strict import StrictLoadingMixin
from omni.modality import Modality
from omni.registry import get_modality


def gather(cls: Any, folder: Path, kwargs: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """All tensors of a checkpoint with parts in other folders; None if it has no such parts.

    Args:
        cls: the class of the model.
        folder: the folder of the checkpoint.
        kwargs: arguments of `from_pretrained`. The configuration and the tensors are added.

    Raises:
        CheckpointError: the folder of a part does not exist, or does not hold the part.
    """
    given = kwargs.get("config")
    values = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    saved = getattr(given, "parts_from", None) if given is not None else values.get("parts_from")
    if not isinstance(saved, Mapping):
        return None
    places = {**saved, **kwargs.pop("parts_from", {})}
    if given is None:
        # these are for the weights, not for the configuration
        of_loading = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
        given, rest = cls.config_class.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
        kwargs.clear()
        kwargs.update(rest | of_loading)
    there = {"language_model", *(f"{name}_tower" for name in given.modalities)}  # a modality may be left out
    given.parts_from = {part: os.path.abspath(folder / place) for part, place in places.items() if part in there}
    for part, place in given.parts_from.items():
        if not os.path.isdir(place):
            raise CheckpointError(
                f"The checkpoint {named(folder)} has its {part} in {place!r}, which is not there; put it there, or say "
                f"where it is: from_pretrained(..., parts_from={{{part!r}: FOLDER}})."
            )
    tensors = read_tensors(folder, kwargs.pop("variant", None)) | read_parts(given)
    kwargs |= {"config": given, "state_dict": tensors}
    return tensors


def elsewhere(config: Any) -> set[str]:
    """The parts that are in other folders. A language model includes its head."""
    parts = set(getattr(config, "parts_from", None) or ())
    return parts | {"lm_head"} if "language_model" in parts else parts


def read_parts(config: Any, *only: str) -> dict[str, torch.Tensor]:
    """The tensors of the parts in `config.parts_from`, or of `only` some, by their names in the fused model.

    Raises:
        CheckpointError: a folder does not hold such a part.
    """
    tensors: dict[str, torch.Tensor] = {}
    for part in only or config.parts_from:
        place = config.parts_from[part]
        with _reading(part, place), naming_weights(place):
            if part == "language_model":
                with _reading("configuration", os.path.join(place, CONFIG)):
                    AutoConfig.from_pretrained(place, trust_remote_code=False)
                model, report = AutoModelForCausalLM.from_pretrained(
                    place, dtype="auto", trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
                )
                weights = weights_file(Path(place), None).name
                mismatched = (name for name, *_ in report["mismatched_keys"])
                if wrong := sorted({*report["missing_keys"], *mismatched}):
                    raise ValueError(f"its {CONFIG} and {weights} do not agree on {wrong[0]}; get the folder again.")
                grow_vocabulary(model, config.text_config.vocab_size)
                tensors |= _named(model.base_model, "model.language_model.")
                if not config.tie_word_embeddings:
                    tensors |= _named(model.get_output_embeddings(), "lm_head.")
            else:
                name = part.removesuffix("_tower")
                encoder, _ = read_tower(
                    get_modality(name), Path(place), config.modalities[name]["encoder"], dtype="auto"
                )
                tensors |= _named(encoder, f"model.{part}.")
    return tensors


def tower_class(bundle: Modality, config: Any) -> type[PreTrainedModel]:
    """The class of the tower that the bundle builds from this configuration."""
    with torch.device("meta"):
        return type(bundle.build_tower(copy.deepcopy(config)))


def read_tower(bundle: Modality, folder: Path, config: Any, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load an encoder as a tower.

    Args:
        bundle: the encoder's modality.
        folder: the folder of the encoder, or of a model that contains it.
        config: the encoder's configuration, or its section in that of the whole model.
        options: arguments of `from_pretrained`.

    Returns:
        The encoder, and transformers' report about missing, unexpected and mis-shaped tensors.
    """
    found: Any = tower_class(bundle, config)
    cls = found
    if not issubclass(cls, StrictLoadingMixin):  # omni's classes find their section themselves
        options["config"] = config
        cls = type(cls.__name__, (_NothingExcused, cls), {"__module__": cls.__module__})
    model, report = cls.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    model.__class__ = found
    return model, report


class _NothingExcused:
    """A base before a model of transformers: the report names all missing parameters, even those that the class excuses."""

    def post_init(self) -> None:
        super().post_init()  # type: ignore[misc]
        buffers = dict(self.named_buffers())  # type: ignore[attr-defined]
        self._keys_to_ignore_on_load_missing = set(map(re.escape, buffers))


def grow_vocabulary(model: Any, rows: int) -> None:
    """Give a language model embeddings for new tokens, `rows` in all.

    Each new row is the mean of the old ones. So the logit of a new token is the mean of all others and never the largest,
    and the result is always the same.
    """
    old = len(model.get_input_embeddings().weight)
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in {id(each): each for each in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        for tensor in (layer.weight, getattr(layer, "bias", None)):
            if tensor is not None:
                tensor.data[old:] = tensor.data[:old].float().mean(0).to(tensor.dtype)


@contextmanager
def kept_apart(
    config: Any, tensors: Mapping[str, torch.Tensor], save_directory: Path
) -> Iterator[dict[str, dict[str, str]]]:
    """The unchanged parts from other folders, each with its fingerprints there.

    A language model may include an `lm_head`. Inside, `config.parts_from` names only these parts, with paths relative to
    `save_directory`.

    Args:
        config: the model's configuration, with the present fingerprints of its parts.
        tensors: the model's tensors by name.
        save_directory: the folder where the other parts are saved.
    """
    places, kept = config.parts_from or {}, {}
    for part in places if tensors else ():
        there = read_parts(config, part)  # in the precision of its folder, which may differ from the model's
        if all(torch.equal(tensor.to(tensors[name].dtype), tensors[name].cpu()) for name, tensor in there.items()):
            kept[part] = fingerprint_parts(there)
    config.parts_from = {part: os.path.relpath(places[part], save_directory) for part in kept} or None
    try:
        yield kept
    finally:
        config.parts_from = {part: places[part] for part in kept} or None


def _named(module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


@contextmanager
def _reading(part: str, place: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # other libraries read the folder, and may raise anything
        raise CheckpointError(f"The {part} in {place!r} cannot be used: {reason_of(error)}") from error

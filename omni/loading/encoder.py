"""Loads an encoder of any modality with its preprocessor, in the reference arithmetic."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PreTrainedModel

from omni.checkpoints.fingerprints import naming_weights
from omni.checkpoints.folder import CheckpointError, expect_folder, reason_of
from omni.checkpoints.seal import MODEL, verify_files
from omni.checkpoints.strict import StrictLoadingMixin
from omni.classification.configuration_classifier import OmniClassifierConfig
from omni.classification.modeling_classifier import OmniForClassification
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.encoded_item import EncodedItem
from omni.fusion.modeling_omni import OmniModel
from omni.fusion.parts import read_tower, tower_class
from omni.fusion.placement import check_items
from omni.fusion.processing_omni import OmniProcessor
from omni.loading.preprocessor import load_preprocessor
from omni.modality import Modality
from omni.registry import get_modality, load_modalities, make_probes, prepare_items, registered

Inputs = dict[str, torch.Tensor]
"""Tensors by the batch keys of a modality, such as `pixel_values` float[B, 3, H, W]."""
Tokens = dict[str, torch.Tensor]
"""Tensors by name: `cls` float[B, 1, D], `grid` float[B, N, D], and from a fused model `projected` float[B, n, T]. If items
have different numbers of tokens, N and n are the largest, and an item's own tokens come first."""


@dataclass(frozen=True)
class Encoder:
    """An encoder with its preprocessor.

    Attributes:
        model: the encoder.
        preprocessor: turns items into the encoder's inputs.
        pooled: whether the encoder's `pooler_output` is trained.
        fused: the fused model that the encoder is a tower of; None if it is alone.
        modality: the name of its modality; by default found from the encoder.

    Raises:
        ValueError: the encoder belongs to no modality, or may belong to several.
    """

    model: PreTrainedModel
    preprocessor: Any
    pooled: bool = True
    fused: OmniModel | None = None
    modality: str = ""

    def __post_init__(self) -> None:
        if not self.modality:
            object.__setattr__(self, "modality", _modality_of(self.model))

    @property
    def bundle(self) -> Modality:
        """The bundle of its modality."""
        return get_modality(self.modality)

    def untrained(self, seed: int) -> "Encoder":
        """The same architecture with random weights, which depend only on the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.bundle.build_tower(copy.deepcopy(self.model.config)).to(self.model.dtype)
        return replace(self, model=model.to(self.model.device).eval(), pooled=True)

    def prepare(self, items: Sequence[Any]) -> Inputs:
        """The encoder's inputs for a batch of items, on its device."""
        made = prepare_items(self.bundle, self.preprocessor, list(items), {"return_tensors": "pt"})
        device, dtype = self.model.device, self.model.dtype
        tensors = {key: torch.as_tensor(value) for key, value in made.items()}
        return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in tensors.items()}

    def probes(self) -> list[Any]:
        """A few made-up items, see `make_probes`."""
        return make_probes(self.bundle, self.model.config, self.preprocessor)

    def grid_shapes(self, inputs: Inputs) -> list[tuple[int, ...]]:
        """The shape of each item's grid, such as rows and columns of patches."""
        return [tuple(shape) for shape in self.bundle.grid_shapes(self.model.config, inputs)]

    def grid_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """The shape of the grid, which must be the same for all items."""
        (shape,) = set(self.grid_shapes(inputs))
        return shape

    def counts(self, what: str, shapes: Sequence[tuple[int, ...]]) -> list[int]:
        """The number of each item's tokens of one name: "cls", "grid" or "projected".

        Args:
            what: the name.
            shapes: the shape of each item's grid.
        """
        if what == "projected" and self.fused is not None:
            return [self.fused.config.num_tokens(self.modality, shape) for shape in shapes]
        return [1 if what == "cls" else math.prod(shape) for shape in shapes]

    @torch.inference_mode()
    def encode(self, inputs: Inputs) -> Tokens:
        """The tokens of prepared items."""
        arguments = self.bundle.arguments
        encoded = self.model(**{arguments[key]: value for key, value in inputs.items()})
        if not self.pooled:
            encoded["pooler_output"] = None
        return self.name(encoded, self.grid_shapes(inputs))

    @torch.inference_mode()
    def name(self, encoded: Any, shapes: Sequence[tuple[int, ...]]) -> Tokens:
        """The tokens of an encoder's output by name, with `projected` ones if the encoder is a tower.

        Args:
            encoded: the encoder's output.
            shapes: the shape of each item's grid.
        """
        patches = max(map(math.prod, shapes))
        tokens: Tokens = dict(self.bundle.read(encoded, patches))
        check_items(self.modality, tokens, len(shapes))
        if "grid" in tokens:  # some encoders pad to the longest possible item
            tokens["grid"] = tokens["grid"][:, :patches]
        wanted = self.fused.config.modalities[self.modality]["output"].split("+") if self.fused else []
        if self.fused and tokens.keys() >= {*wanted}:
            own = [
                {part: tokens[part][i, : math.prod(shape)] if part == "grid" else tokens[part][i] for part in wanted}
                for i, shape in enumerate(shapes)
            ]
            items = [EncodedItem(each, shape) for each, shape in zip(own, shapes, strict=True)]
            tokens["projected"] = pad_sequence(self.fused.project(self.modality, items), batch_first=True)
        return tokens


def load_encoder(checkpoint: str | Path, modality: str | None = None) -> Encoder:
    """Load an encoder of omni, a plug-in or transformers from a folder. Nothing is downloaded.

    From a model of several parts, such as CLIP, a fused model or a classifier, its encoder is loaded.

    Args:
        checkpoint: the folder.
        modality: the name of the encoder's modality; needed if there are several encoders.

    Raises:
        CheckpointError: the folder holds no encoder of this modality, or several; its preprocessor is missing or makes other
            inputs than the encoder takes; or weights are missing or damaged.
    """
    folder = Path(checkpoint)
    with _reading(folder):
        verify_files(folder, MODEL)
        bundle, part = _find(folder, modality)
        if isinstance(part, OmniConfig):
            encoder = _of_fused(folder, bundle.name)
        elif isinstance(part, OmniClassifierConfig):
            model = OmniForClassification.from_pretrained(folder).eval()
            encoder = Encoder(model.encoder, load_preprocessor(bundle, folder), modality=bundle.name)
        else:
            model, pooled = _of_own_folder(bundle, folder, part)
            encoder = Encoder(model.eval(), load_preprocessor(bundle, folder), pooled, modality=bundle.name)
        if bundle.probes is not None:
            encoder.encode(encoder.prepare(encoder.probes()[:1]))
    return encoder


def modality_of(checkpoint: str | Path, modality: str | None = None) -> Modality:
    """The modality of the encoder that `load_encoder` would load. No weights are read.

    Raises:
        CheckpointError: the folder holds no encoder of this modality, or several.
    """
    with _reading(Path(checkpoint)):
        return _find(Path(checkpoint), modality)[0]


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    expect_folder(folder)  # otherwise transformers would search the internet, and its message would be about that
    try:
        with naming_weights(folder):
            yield
    except Exception as error:  # other libraries read the folder, and may raise anything
        said = f"The checkpoint {str(folder)!r} cannot be loaded as an encoder: {reason_of(error)}"
        raise CheckpointError(said) from error


def _find(folder: Path, modality: str | None) -> tuple[Modality, Any]:
    """The modality of the encoder in a folder and its configuration, or that of omni's model that it is part of."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if isinstance(config, OmniClassifierConfig) and modality in (None, config.modality):
        return get_modality(config.modality), config
    if not isinstance(config, OmniConfig):
        return find_encoder(config, modality)
    names = sorted(config.modalities)
    if modality is None and len(names) != 1:
        raise ValueError(f"its modalities are {', '.join(names) or 'none'}; name the one that is meant.")
    name = modality or names[0]
    if name not in names:
        raise ValueError(f"its modalities are {names}, expected one named {name!r}.")
    return get_modality(name), config


def _of_fused(folder: Path, name: str) -> Encoder:
    fused = OmniModel.from_pretrained(folder).eval()
    preprocessor = OmniProcessor.from_pretrained(folder).preprocessors[name]
    return Encoder(getattr(fused, f"{name}_tower"), preprocessor, fused=fused, modality=name)


def _of_own_folder(bundle: Modality, folder: Path, config: Any) -> tuple[PreTrainedModel, bool]:
    """An encoder, and whether its pooler is trained. Classifiers are saved without ViT's pooler, which omni ignores."""
    if type(config) is bundle.config_class and issubclass(bundle.model_class, StrictLoadingMixin):
        return bundle.model_class.from_pretrained(folder), True
    model, report = read_tower(bundle, folder, config)
    lacking = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lost := [name for name in lacking if not name.startswith("pooler.")]:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ValueError(f"its weights lack or mis-shape {', '.join(lost[:5])}{more}.")
    return model, not lacking


# --- Which modality a model belongs to --------------------------------------------------------------------------------


def find_encoder(config: Any, modality: str | None = None) -> tuple[Modality, Any]:
    """The modality of the encoder that a configuration describes, and the encoder's part of the configuration.

    Args:
        config: the configuration of an encoder, or of a model of several parts such as CLIP.
        modality: the only modality that counts; by default any.

    Raises:
        ValueError: there is no such encoder, or there are several.
    """
    inner: list[Any] = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    parts = [part for part in (*inner, config) if part is not None]
    among = [get_modality(modality)] if modality else None
    for part in parts:
        found = _owners(part, among)
        if len(found) > 1:
            raise ValueError(
                f"a model of type {part.model_type!r} may be an encoder of {' or '.join(each.name for each in found)}; name "
                "the modality that is meant."
            )
        if found:
            return found[0], part
    kind = f"encoder of {among[0].noun}s" if among else "encoder of any modality here"
    raise ValueError(f"a model of type {config.model_type!r} is no {kind}; name the folder of one.")


def _owners(config: Any, among: Sequence[Modality] | None) -> list[Modality]:
    """The modalities of a configuration's encoder: the one that defines its class, or all whose inputs fit."""
    if own := _own(config, among):
        return own
    found, reads = list[Modality](), ""
    for bundle in load_modalities()[0] if among is None else among:
        try:
            cls = tower_class(bundle, config)
        except Exception:  # this modality cannot build a tower from such a configuration
            continue
        if (name := cls.main_input_name) in bundle.arguments.values():
            found.append(bundle)
            reads = name
    return _nearest(found, reads)


def _nearest(found: list[Modality], reads: str) -> list[Modality]:
    """Prefer modalities whose batch key is the encoder's argument: `pixel_values` means pictures rather than videos."""
    return [each for each in found if reads in each.inputs] or found


def _own(config: Any, among: Sequence[Modality] | None = None) -> list[Modality]:
    """The modality that defines the class of a configuration. All plug-ins are loaded only if no loaded one defines it."""

    def brought(bundles: Iterable[Modality]) -> list[Modality]:
        return [each for each in bundles if type(config) is each.config_class]

    return brought(among) if among is not None else brought(registered()) or brought(load_modalities()[0])


def _modality_of(model: PreTrainedModel) -> str:
    """The name of a model's modality."""
    reads = model.main_input_name
    found = _own(model.config)
    found = found or _nearest([each for each in load_modalities()[0] if reads in each.arguments.values()], reads)
    if len(found) != 1:
        others = " or ".join(each.name for each in found) or "no modality"
        raise ValueError(f"A {type(model).__name__} reads {reads!r}, as {others} does; name its modality.")
    return found[0].name

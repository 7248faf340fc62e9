"""The subject of an examination: a bundle, and its items, processor and small fused model, which are made on demand.

Shapes: I items, N tokens of the grid, D width of the encoder.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.modality import Modality
from omni.training.tokenizer import train_tokenizer

FEW = 4
"""The smallest number of items."""

WORDS = ["what is that", "which of these is it", "this one", "none of them"]
THINKER = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2**16,
    "bos_token_id": None,
}

Tokens = dict[str, torch.Tensor]


class Subject:
    """A bundle under examination.

    Args:
        modality: the bundle.
        files: example files, which become items.
        encoder: settings of the encoder that differ from its defaults.
        address: the "module:attribute" of a bundle that has no entry point, for a fresh process.
    """

    def __init__(
        self,
        modality: Modality,
        files: Sequence[Path] = (),
        encoder: Mapping[str, Any] | None = None,
        address: str | None = None,
    ) -> None:
        self.modality, self.files, self.settings, self.address = modality, list(files), dict(encoder or {}), address
        self.name = modality.name
        self._scratch = TemporaryDirectory(prefix="omni-check-")

    def owns(self, module: str) -> bool:
        """Whether a module belongs to the plug-in."""
        modality = self.modality
        parts = (modality.config_class, modality.model_class, modality.preprocessor_class, modality.grid_shapes)
        packages = {part.__module__.rpartition(".")[0] or part.__module__ for part in parts}
        return any(f"{module}.".startswith(f"{package}.") for package in packages)

    def folder(self, name: str) -> Path:
        """A folder of this name for files. All of them are removed with the subject."""
        folder = Path(self._scratch.name, name)
        folder.mkdir(exist_ok=True)
        return folder

    # --- parts --------------------------------------------------------------------------------------------------------

    @cached_property
    def items(self) -> list[Any]:
        """The items in the files, then the bundle's `probes`, repeated if they are fewer than `FEW`."""
        opened = [self.modality.open(str(file)) for file in self.files] if self.modality.open else []
        found = opened + self.probes()
        return found * math.ceil(FEW / len(found)) if found else []

    def probes(self) -> list[Any]:
        """The items of the bundle's `probes`."""
        if self.modality.probes is None:
            return []
        encoder = self.config.modalities[self.name]["encoder"]
        return list(self.modality.probes(encoder, self.processor.preprocessors[self.name]))

    @cached_property
    def tokenizer(self) -> Any:
        """A tokenizer of a few words and bytes, with the placeholder."""
        return train_tokenizer(WORDS * 4, 300, {self.name: self.modality.token})

    @cached_property
    def output(self) -> str:
        """The outputs that the projector of the fused model reads: all that the bundle names."""
        return max(self.modality.outputs, key=len)

    @cached_property
    def config(self) -> OmniConfig:
        """The configuration of the fused model."""
        tokenizer = self.tokenizer
        section = {"encoder": copy.deepcopy(self.settings), "output": self.output, "projector": "mlp"}
        section["token_id"] = tokenizer.convert_tokens_to_ids(self.modality.token)
        text = {**THINKER, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return OmniConfig(modalities={self.name: section}, text_config={**text, "eos_token_id": tokenizer.eos_token_id})

    @cached_property
    def processor(self) -> OmniProcessor:
        """The processor of the fused model. Its preprocessor has default settings."""
        return OmniProcessor(tokenizer=copy.deepcopy(self.tokenizer), modalities=self.config.modalities)

    @cached_property
    def model(self) -> OmniForConditionalGeneration:
        """The fused model, in eval mode. All parameters are random, so that all inputs of its Thinker matter."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = OmniForConditionalGeneration(self.config).eval()
            tower = {id(parameter) for parameter in getattr(model.model, f"{self.name}_tower").parameters()}
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        noise = torch.randn_like(parameter)
                        parameter += (0.02 if id(parameter) in tower or parameter.ndim < 2 else 0.2) * noise
        return model

    @property
    def encoder(self) -> Any:
        """The tower of the fused model."""
        return getattr(self.model.model, f"{self.name}_tower")

    # --- calls --------------------------------------------------------------------------------------------------------

    def prepare(self, items: Sequence[Any], processor: OmniProcessor | None = None) -> dict[str, Any]:
        """The batch of `inputs` of some items, as tensors."""
        return (processor or self.processor).prepare(self.name, list(items), {"return_tensors": "pt"})

    def shapes(self, inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
        """The shape of each item's grid."""
        shapes = self.modality.grid_shapes(self.config.modalities[self.name]["encoder"], inputs)
        return [tuple(shape) for shape in shapes]

    def encode(self, inputs: Mapping[str, Any], encoder: nn.Module | None = None) -> Any:
        """The encoder's output."""
        arguments = {self.modality.arguments[key]: value for key, value in inputs.items()}
        return (encoder or self.encoder)(**arguments, return_dict=True)

    def tokens(self, items: Sequence[Any], encoder: nn.Module | None = None) -> list[Tokens]:
        """For each item of a batch its own tokens: `cls` float[1, D] and `grid` float[N, D]."""
        inputs = self.prepare(items)
        encoded, shapes = self.encode(inputs, encoder), self.shapes(inputs)
        found = []
        for number, shape in enumerate(shapes):
            named = self.modality.read(encoded, math.prod(shape))
            found.append(
                {part: value[number][: math.prod(shape) if part == "grid" else 1] for part, value in named.items()}
            )
        return found

    def batch(self, rows: Sequence[tuple[str, Sequence[Any]]], **options: Any) -> dict[str, torch.Tensor]:
        """The padded inputs of the fused model, from prompts and their items."""
        items = [item for _, items in rows for item in items]
        given = {self.modality.argument: items} if items else {}
        texts = [text for text, _ in rows]
        return dict(self.processor(text=texts, **given, return_tensors="pt", padding=True, **options))

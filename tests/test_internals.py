"""Every private name of transformers, torch and Pillow that omni leans on: what it is, what for, and with which parameters.

A new release of one of them fails here first, and says which name is meant. The last test reads omni's code and finds names
that the list lacks, and names on the list that nobody uses.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

import omni

ROOT = Path(omni.__file__).parent
FOREIGN = ("transformers", "torch", "PIL", "peft", "accelerate", "safetensors", "tokenizers", "huggingface_hub")


@dataclass(frozen=True)
class Internal:
    """A private name.

    Attributes:
        place: "module:attribute.path".
        why: what omni does with it.
        parameters: of a function, those that omni names or relies on, in order.
        made: an attribute of instances only; looked for in the source of its class instead.
        since: the version of transformers that brought it; omni does without it before.
    """

    place: str
    why: str
    parameters: tuple[str, ...] = ()
    made: bool = False
    since: str = "0"

    @property
    def name(self) -> str:
        return self.place.rpartition(":")[2].rpartition(".")[2]

    @property
    def is_newer(self) -> bool:
        return Version(transformers.__version__) < Version(self.since)

    @property
    def is_there(self) -> bool:
        """Whether it can be found; what torch computes with depends on how it was built."""
        module, _, path = self.place.partition(":")
        found: Any = importlib.import_module(module)
        parts = path.split(".") if path else []
        for part in parts[:-1] if self.made else parts:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        if self.made:
            return any(re.search(rf"\b{self.name}\b", inspect.getsource(cls)) for cls in found.__mro__[:-1])
        if not self.parameters:
            return True
        known = inspect.signature(found).parameters
        return [name for name in known if name in self.parameters] == [*self.parameters]


GENERATION = "transformers.generation.utils:GenerationMixin"
MODEL = "transformers.modeling_utils:PreTrainedModel"
PROCESSOR = "transformers.processing_utils:ProcessorMixin"

TRANSFORMERS = [
    Internal(
        f"{GENERATION}._expand_multimodal_outputs",
        "encoded items repeat with their row",
        ("input_ids", "mm_encoder_output", "expand_size", "inputs_embeds"),
    ),
    *(
        Internal(f"{MODEL}.{name}", "what a model says of itself to transformers")
        for name in (
            "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend",
            "_can_compile_fullgraph", "_can_record_outputs", "_no_split_modules", "_skip_keys_device_placement",
            "_input_embed_layer", "_tied_weights_keys",
        )
    ),
    *(
        Internal(f"{MODEL}.{name}", "no class excuses tensors that a checkpoint lacks")
        for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
    ),
    Internal(f"{MODEL}._init_weights", "CLS and positions start at zero", ("module",)),
    Internal(
        "transformers.configuration_utils:PreTrainedConfig._attn_implementation", "which attention a part runs on", made=True
    ),
    Internal(
        f"{PROCESSOR}._multimodal_inputs_from_conversations",
        "items of every modality are taken from chats",
        ("conversations", "audio_loading_params"),
        since="5.23",
    ),
    Internal(
        f"{PROCESSOR}._resolve_audio_loading_params",
        "no rate is made up for the sounds of a chat",
        ("processor_kwargs",),
        since="5.23",
    ),
    Internal("transformers.processing_utils:_UNMARKED", "a placeholder in a user's text stays text", since="5.23"),
    Internal(f"{PROCESSOR}._merge_kwargs", "settings of tokenizer and image processor are told apart"),
    Internal("transformers:Trainer._get_train_sampler", "sounds of one length make a batch", ("train_dataset",)),
    Internal(
        "transformers:Trainer._load_from_checkpoint", "a resumed run loads strictly", ("resume_from_checkpoint", "model")
    ),
]  # fmt: skip
TORCH = [
    Internal("torch.nn:Module._forward_hooks", "a model with hooks is not packed", made=True),
    Internal("torch.nn:Module._forward_pre_hooks", "a model with hooks is not packed", made=True),
    Internal("torch.nn:Module._parameters", "a sharded parameter is replaced by a whole one", made=True),
    Internal("torch.utils._python_dispatch:TorchDispatchMode", "every operation of an encoder is seen"),
    Internal("torch:_softmax", "the softmax of written-out attention is found among operations"),
    Internal("torch.cpu:_init_amx", "whether the processor's matrix units may be used"),
    Internal("torch.cpu:_is_avx512_bf16_supported", "whether vectors multiply bfloat16"),
    Internal("torch:ops.mkldnn._is_mkldnn_bf16_supported", "whether oneDNN multiplies bfloat16"),
    Internal("torch:ops.mkldnn._linear_pointwise", "oneDNN's product with bias and activation"),
    Internal("torch:ops.mkldnn._reorder_linear_weight", "weights in oneDNN's order"),
]
PILLOW = [
    Internal("PIL.Image:Image._new", "a picture with the pixels of another step", ("im",)),
    Internal("PIL.Image:Image._im", "the pixels of a picture that was decoded elsewhere", made=True),
    Internal(
        "PIL.ImageFile:ImageFile._open", "formats that are read more strictly open as Pillow opens them", made=True
    ),
    Internal("PIL._imaging:", "the library that Pillow's libtiff is linked into"),
]
INTERNALS = [*TRANSFORMERS, *TORCH, *PILLOW]


@pytest.mark.parametrize("internal", INTERNALS, ids=[each.place for each in INTERNALS])
def test_it_is_there_and_takes_what_it_took(internal: Internal) -> None:
    if internal.is_newer:
        pytest.skip(f"it came with transformers {internal.since}")
    assert internal.is_there, f"omni leans on {internal.place} for this: {internal.why}"


# --- The list is whole ------------------------------------------------------------------------------------------------


def imported_and_read() -> Iterator[tuple[str, str]]:
    """Private names that omni's code imports or reads from objects that are not its own, and where."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.rglob("*.py"))}
    own = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                own |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.arg):
                own.add(node.arg)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FOREIGN:
                hidden = any(part.startswith("_") for part in node.module.split("."))
                for alias in node.names:
                    if hidden or alias.name.startswith("_"):
                        yield alias.name, str(path)
            elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and node.attr not in own:
                yield node.attr, str(path)


BY_METACLASSES = ("_abc_impl", "_backward_cls")
"""Attributes that Python and torch give to every subclass."""


def overridden() -> Iterator[tuple[str, str]]:
    """Private methods and attributes of foreign classes that omni's classes replace, and where."""
    for info in pkgutil.walk_packages(omni.__path__, "omni."):
        if info.name.endswith(("__main__", ".vllm", ".vllm_model")):
            continue
        for cls in vars(importlib.import_module(info.name)).values():
            if not inspect.isclass(cls) or cls.__module__ != info.name:
                continue
            bases = [base for base in cls.__mro__[1:] if base.__module__.split(".")[0] in FOREIGN]
            for name in vars(cls):
                if (
                    re.match(r"_[a-z]", name)
                    and name not in ("_abc_impl", "_backward_cls")
                    and any(name in vars(base) for base in bases)
                ):
                    yield name, info.name


def test_the_list_names_every_internal_that_is_used_and_no_other() -> None:
    used = dict([*imported_and_read(), *overridden()])
    listed = {internal.name or internal.place.rpartition(".")[2].strip(":") for internal in INTERNALS}
    assert {name: where for name, where in used.items() if name not in listed} == {}
    elsewhere = {  # set on instances; or asked for by name
        "_tied_weights_keys",
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
        "_UNMARKED",
    } | {internal.name for internal in INTERNALS if internal.is_newer}
    if not (ROOT / "fast").is_dir():
        pytest.skip("what only omni.fast uses cannot be judged without it")
    assert listed - used.keys() - elsewhere == set()

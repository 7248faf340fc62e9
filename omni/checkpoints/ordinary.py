"""Loading of an ordinary checkpoint: what transformers makes of it, in two thirds of the time.

Of each tensor transformers asks whether it is to be renamed, converted, quantised, cut up or sent elsewhere. In a small
local file that omni wrote (it has fingerprints) every tensor of the model has its name and its shape. Where all are of
float32, and no other one is there, nothing is to be done but to map the file, as transformers does, and to put the tensors
into their places. Whatever is not so, or asks for more, is left to transformers, and so is every complaint.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.initialization import TORCH_INIT_FUNCTIONS, TORCH_MODULES_TO_PATCH
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.monkey_patching import get_patch_mapping, patch_output_recorders

from .fingerprints import map_tensors

SMALL = 256 * 2**20
"""Bytes of a file that is loaded so. The model is built in memory before it is filled; larger ones are on "meta"."""

WITHOUT_SAYING: dict[str, Sequence[Any]] = {
    "_from_auto": (True,),
    "use_safetensors": (True,),
    "local_files_only": (True, False),
    "trust_remote_code": (None, False),
    "adapter_kwargs": (None, {}, {"revision": None}),
    **dict.fromkeys(("cache_dir", "device_map", "proxies", "revision", "token"), (None,)),
    **dict.fromkeys(("dtype", "torch_dtype"), (None, "auto")),
}
"""Arguments of `from_pretrained` and the values that change nothing; Auto classes and `pipeline` pass some of them."""

UNUSUAL = ("quantization_config", "fusion_config", "transformers_weights")
"""What in a configuration makes more of loading."""


def load_ordinary(cls: Any, folder: Any, kwargs: Mapping[str, Any]) -> Any | None:
    """The model of class `cls` in a folder, in eval mode; None where this is not ordinary.

    Args:
        cls: a `PreTrainedModel`.
        folder: as it was given to `from_pretrained`.
        kwargs: what else was.
    """
    if folder is None or _asks_for_more(kwargs):
        return None
    file = Path(folder) / "model.safetensors"
    if not file.is_file() or file.stat().st_size > SMALL or (file.parent / "adapter_config.json").exists():
        return None
    try:
        found = map_tensors(file)
    except (ValueError, OSError):
        return None
    values, _ = PreTrainedConfig.get_config_dict(folder)
    if not values.get("fingerprints") or values.get("model_type") != cls.config_class.model_type:
        return None
    config = copy.deepcopy(kwargs.get("config"))
    if config is None:  # without transformers' line for the log, for which all of it would be written down
        config = cls.config_class(**values)
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    dtypes = {config.dtype or torch.float32, *(entry.dtype for entry in found.values())}
    unusual = any(getattr(part, name, None) for part in parts for name in UNUSUAL)
    if unusual or bool(getattr(type(config), "extra_files", None)) or dtypes != {torch.float32}:
        return None
    for part in parts:
        part.dtype = torch.float32
    config.name_or_path = folder
    with nothing_drawn():  # and not on "meta", where buffers would have to be computed a second time
        model = cls(config)
    if not _put({name: entry.tensor() for name, entry in found.items()}, model):
        return None
    model._weight_conversions = []  # none to be undone when the model is saved
    patch_output_recorders(model)
    model.tie_weights(recompute_mapping=False)
    if any(model.get_parameter(a) is not model.get_parameter(b) for a, b in model.all_tied_weights_keys.items()):
        return None  # while another thread loads a model, transformers ties none in any thread
    model.eval()
    model.set_use_kernels(False)
    if model.can_generate():
        model.adjust_generation_fn(
            None, False, None, folder, cache_dir=None, force_download=False, proxies=None, local_files_only=True,
            token=None, revision=None, subfolder="", trust_remote_code=None,
        )  # fmt: skip
    return model


def _asks_for_more(kwargs: Mapping[str, Any]) -> bool:
    """Whether there is anything in the arguments, or around the call, but what goes without saying."""
    others = {name: value for name, value in kwargs.items() if name != "config"}
    return (
        any(value not in WITHOUT_SAYING.get(name, ()) for name, value in others.items())
        or not isinstance(kwargs.get("config"), PreTrainedConfig | None)
        or torch.get_default_device().type != "cpu"
        or torch.get_default_dtype() != torch.float32
        or bool(get_patch_mapping())
        or is_deepspeed_zero3_enabled()
        or is_fsdp_enabled()
    )


def _put(tensors: Mapping[str, torch.Tensor], model: Any) -> bool:
    """Make tensors the parameters and buffers of a model, and mark it as initialised; False if they are not just those."""
    places: dict[str, tuple[torch.nn.Module, str]] = {}
    for path, module in model.named_modules():
        module._is_hf_initialized = True
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and name not in module._non_persistent_buffers_set:
                places[f"{path}.{name}" if path else name] = module, name
    for tied in model.all_tied_weights_keys:
        places.pop(tied, None)
    if tensors.keys() != places.keys():
        return False
    if any(getattr(module, name).shape != tensors[key].shape for key, (module, name) in places.items()):
        return False
    for key, (module, name) in places.items():
        tensor: Any = getattr(module, name)
        tensor.data = tensors[key]  # and not another object: some modules have it in other places, too
        tensor.requires_grad_(name in module._parameters)
        tensor._is_hf_initialized = True
    return True


# --- Weights that nobody draws ----------------------------------------------------------------------------------------

_here = threading.local()


def _unless_here(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns its first argument inside of `nothing_drawn`."""

    @wraps(function)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        if getattr(_here, "nothing_drawn", False):
            return args[0] if args else next(iter(kwargs.values()))
        return function(*args, **kwargs)

    return drawn


_DRAWN = {name: _unless_here(function) for name, function in TORCH_INIT_FUNCTIONS.items()}


@cache
def _init_weights() -> tuple[Any, str, Any, Any]:
    from transformers import (
        PreTrainedModel,
    )  # not at the start: it may be this module that asks for omni's registrations

    return PreTrainedModel, "init_weights", PreTrainedModel.init_weights, _unless_here(PreTrainedModel.init_weights)


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Inside, in this thread, the parameters of a new model are memory as it was, since they will be replaced.

    `no_init_weights` of transformers does so to all threads, and for ever where two of them overlap: each puts back what it
    has found. These functions draw in any other place, even if they are left behind.
    """
    places: list[tuple[Any, str, Any, Any]] = [_init_weights()]
    for module in filter(None, map(sys.modules.get, TORCH_MODULES_TO_PATCH)):
        places += [(module, name, TORCH_INIT_FUNCTIONS[name], _DRAWN[name]) for name in _DRAWN if hasattr(module, name)]
    before = [getattr(owner, name) for owner, name, _, _ in places]
    outside, _here.nothing_drawn = getattr(_here, "nothing_drawn", False), True
    try:
        for owner, name, _, ours in places:
            setattr(owner, name, ours)
        yield
    finally:
        _here.nothing_drawn = outside
        for (owner, name, original, ours), found in zip(places, before, strict=True):
            if getattr(owner, name) is ours and not outside:
                setattr(owner, name, original if found is ours else found)

"""The signature of `forward`: it names the inputs of every registered modality, and the cache as transformers does.

`generate`, Trainer, peft and accelerate learn from a signature what a model takes. So the signature follows the registry.
It belongs to the class, so that copies and wrapped instances have it too. The `get_<name>_features` methods follow as well.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from omni.registry import on_change, registered

CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""transformers' name of the cache: "past_key_values" up to 5.23."""


def named_cache(inputs: Mapping[str, Any], name: str = CACHE) -> dict[str, Any]:
    """The inputs, with the cache under this one of its two names.

    Raises:
        ValueError: there are two caches.
    """
    other = "past_key_values" if name == "cache" else "cache"
    if inputs.get(other) is not None and inputs.get(name) is not None:
        raise ValueError("Expected one cache, found two, as `past_key_values` and as `cache`; give one of them.")
    given = inputs[other] if inputs.get(other) is not None else inputs.get(name)
    rest = {key: value for key, value in inputs.items() if key not in (name, other)}
    return rest if given is None else {**rest, name: given}


def cache_by_either_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes `cache` for `past_key_values`."""

    @wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **named_cache(kwargs, "past_key_values"))

    return wrapper


def follow_registry(model: type[Any], with_head: type[Any]) -> None:
    """Have the signatures of `forward` name the inputs of all modalities, now and after each change.

    Args:
        model: its forward has all arguments but the inputs of modalities.
        with_head: its forward takes those arguments, too, and has some of its own.
    """
    shared, own = (list(inspect.signature(cls.forward).parameters.values()) for cls in (model, with_head))
    head = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]

    def follow() -> None:
        for cls, extra in ((model, []), (with_head, head)):
            cls.forward.__signature__ = _with_inputs(shared, extra)
            for modality in registered():
                method = f"get_{modality.name}_features"
                if method not in cls.__dict__:
                    setattr(cls, method, _features_method(modality.name, tuple(modality.inputs)))

    on_change(follow)


def _with_inputs(shared: Sequence[inspect.Parameter], extra: Sequence[inspect.Parameter]) -> inspect.Signature:
    """The shared parameters, more of them, and the inputs of all modalities, before the last one, **kwargs."""
    names = {key: torch.Tensor | None for modality in registered() for key in modality.inputs}
    names |= {} if CACHE in {parameter.name for parameter in shared} else {CACHE: Cache | None}
    inputs = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in names.items()
    ]
    return inspect.Signature([*shared[:-1], *extra, *inputs, shared[-1]])


def _features_method(name: str, inputs: tuple[str, ...]) -> Callable[..., Any]:
    @can_return_tuple
    def get_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.get_features(name, **dict(zip(inputs, args, strict=False)), **kwargs)

    get_features.__name__ = f"get_{name}_features"
    get_features.__doc__ = f"Projected tokens of {name} items; see `OmniModel.get_features`."
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD) for key in inputs]
    parameters += [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
    get_features.__signature__ = inspect.Signature(parameters)
    return get_features

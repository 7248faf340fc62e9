"""The signature of `forward`: it names the inputs of every registered modality, and the cache as transformers does.

`generate`, Trainer, peft and accelerate learn from a signature what a model takes. So the signature follows the registry.
It belongs to the class, so that copies and wrapped instances have it too. The `get_<name>_features` methods follow as well.
"""

import inspect
from collections.abc import Callable, Sequence
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


def cache_by_either_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes `cache` for `past_key_values`."""

    @wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs:
            kwargs["past_key_values"] = kwargs.pop("cache")
        return forward(self, *args, **kwargs)

    return wrapper


def follow_registry(*classes: type[Any]) -> None:
    """Have the signature of these classes' `forward` name the inputs of all modalities, now and after each change."""
    plain = {cls: inspect.signature(cls.forward) for cls in classes}

    def follow() -> None:
        names = [key for modality in registered() for key in modality.inputs]
        for cls in classes:
            cls.forward.__signature__ = plain[cls]
            cls.forward.__signature__ = _with_inputs(cls.forward, names)
            for modality in registered():
                method = f"get_{modality.name}_features"
                if method not in cls.__dict__:
                    setattr(cls, method, _features_method(modality.name, tuple(modality.inputs)))

    on_change(follow)


def _with_inputs(function: Callable[..., Any], names: Sequence[str]) -> inspect.Signature:
    """The signature of `forward` with the inputs of all modalities before its **kwargs."""
    signature = inspect.signature(function, follow_wrapped=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=torch.Tensor | None)
        for name in names
    ]
    if CACHE not in signature.parameters:
        extra.append(inspect.Parameter(CACHE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Cache | None))
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*own, *extra, *rest])


def _features_method(name: str, inputs: tuple[str, ...]) -> Callable[..., Any]:
    @can_return_tuple
    def get_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.get_features(name, **dict(zip(inputs, args, strict=False)), **kwargs)

    get_features.__name__ = f"get_{name}_features"
    get_features.__doc__ = f"Projected tokens of {name} items; see `get_features`."
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD) for key in inputs]
    parameters += [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
    get_features.__signature__ = inspect.Signature(parameters)
    return get_features

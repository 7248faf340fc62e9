"""Puts what is here where the rest of omni asks for it, as soon as that is imported.

Generation goes into `omni.fusion.acceleration`, the packed encoder into the image plug-in. `omni/__init__.py` calls
`install_when_imported`, so nobody else has to. It imports nothing heavy.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from omni.auto import when_imported

if TYPE_CHECKING:
    from omni.fast.packing import PackedVisionModel


def install_when_imported() -> None:
    """Have speed where it may enter, from the moment that somebody could notice."""
    when_imported("omni.fusion.acceleration", ("omni.fast.acceleration",), _accelerate)
    when_imported("omni.vision.plugin", (), _pack_pictures)


def _accelerate(seam: ModuleType) -> None:
    from omni.fast.acceleration import FastAcceleration

    seam.install(FastAcceleration())


def _pack_pictures(plugin: ModuleType) -> None:
    # not by `replace`, which would import the classes that the bundle only names
    object.__setattr__(plugin.image, "pack", pack)


def pack(model: Any, preprocessor: Any, dtype: Any) -> "PackedVisionModel | None":
    """See `omni.fast.packing.pack`, which is imported when an encoder is to be packed."""
    from omni.fast import packing

    return packing.pack(model, preprocessor, dtype)

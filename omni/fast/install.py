"""Installs the fast paths, as soon as the modules that use them are imported.

Generation goes into `omni.fusion.acceleration`, the packed encoder into the bundle of pictures. `omni/__init__.py` calls
`install_when_imported`. It imports nothing heavy.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from omni.auto import when_imported

if TYPE_CHECKING:
    from omni.fast.packing import PackedVisionModel


def install_when_imported() -> None:
    """Install each fast path when the module that uses it is imported."""
    when_imported("omni.fusion.acceleration", ("omni.fast.acceleration",), _accelerate)
    when_imported("omni.vision.plugin", (), _pack_pictures)


def _accelerate(acceleration: ModuleType) -> None:
    from omni.fast.acceleration import FastAcceleration

    acceleration.install(FastAcceleration())


def _pack_pictures(plugin: ModuleType) -> None:
    # `dataclasses.replace` would import the classes that the bundle only names
    object.__setattr__(plugin.image, "pack", pack)


def pack(model: Any, preprocessor: Any, dtype: Any) -> "PackedVisionModel | None":
    """As `omni.fast.packing.pack`, which is imported at the first call."""
    from omni.fast import packing

    return packing.pack(model, preprocessor, dtype)

"""Installs the fast paths, as soon as the modules that use them are imported.

Generation and training go into `omni.fusion.acceleration`, packed encoders into the bundles of pictures and sounds.
`omni/__init__.py` calls `install_when_imported`. It imports nothing heavy.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from omni.auto import when_imported

if TYPE_CHECKING:
    from omni.fast.packed_sounds import PackedAudioModel
    from omni.fast.packing import PackedVisionModel


def install_when_imported() -> None:
    """Install each fast path when the module that uses it is imported."""
    when_imported("omni.fusion.acceleration", ("omni.fast.acceleration",), _accelerate)
    # `dataclasses.replace` would import the classes that a bundle only names
    when_imported("omni.vision.plugin", (), lambda plugin: object.__setattr__(plugin.image, "pack", pack_pictures))
    when_imported("omni.audio.plugin", (), lambda plugin: object.__setattr__(plugin.audio, "pack", pack_sounds))


def _accelerate(acceleration: ModuleType) -> None:
    from omni.fast.acceleration import FastAcceleration

    acceleration.install(FastAcceleration())


def pack_pictures(model: Any, preprocessor: Any, dtype: Any) -> "PackedVisionModel | None":
    """As `omni.fast.packing.pack`, which is imported at the first call."""
    from omni.fast import packing

    return packing.pack(model, preprocessor, dtype)


def pack_sounds(model: Any, preprocessor: Any, dtype: Any) -> "PackedAudioModel | None":
    """As `omni.fast.packed_sounds.pack`, which is imported at the first call."""
    from omni.fast import packed_sounds

    return packed_sounds.pack(model, preprocessor, dtype)

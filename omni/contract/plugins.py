"""Finds bundles by the name of a modality or of an installed package, or by "module:attribute"."""

import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from omni.modality import ENTRY_POINT_GROUP, Modality
from omni.registry import get_modality, modalities


class PluginError(ValueError):
    """There is no plug-in of this name. The message is one sentence."""


def find(name: str) -> list[Modality]:
    """Find the bundles of a name.

    Args:
        name: a modality ("wave"), an installed package ("omni-wave", or "omni_wave" as it is imported), or
            "module:attribute", where the module may be in the current folder.

    Raises:
        PluginError: nothing has this name, or the plug-in cannot be loaded or is no bundle.
    """
    if ":" in name:
        return [_load(name)]
    names = [name] if name in modalities() else _of_package(name)
    try:
        return [get_modality(each) for each in names]
    except ValueError as error:
        raise PluginError(str(error)) from error


def _load(address: str) -> Modality:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = EntryPoint(name=address, value=address, group=ENTRY_POINT_GROUP).load()
    except Exception as error:  # the module may be broken in any way
        raise PluginError(f"{address!r} cannot be loaded ({type(error).__name__}: {error}); fix it.") from error
    if not isinstance(found, Modality):
        raise PluginError(f"{address!r} is a {type(found).__name__}, expected an omni.Modality; name that.")
    return found


def _of_package(name: str) -> list[str]:
    """Names of the modalities of an installed package."""
    try:
        found = [distribution(name)]
    except (PackageNotFoundError, ValueError):  # perhaps the name by which it is imported; this asks all packages
        found = [distribution(each) for each in packages_distributions().get(name, [])]
    if not found:
        raise PluginError(
            f"Expected a modality ({', '.join(modalities())}), an installed package or module:attribute, found {name!r}; "
            "install it, or check the name."
        )
    points = [point for each in found for point in each.entry_points.select(group=ENTRY_POINT_GROUP)]
    if not points:
        raise PluginError(
            f"The package {name!r} brings no modality; name its bundle in the entry points {ENTRY_POINT_GROUP!r} of its "
            "pyproject.toml."
        )
    return sorted({point.name for point in points})

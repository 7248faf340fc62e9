"""The registry: it holds one frozen bundle for each modality. A call adds a bundle, or an installed package brings one.

    from omni import Modality, register_modality

    register_modality(Modality(
        name="signal", token="<signal>", inputs=("signal_values",), config_class=SignalConfig, model_class=SignalEncoder,
        preprocessor_class=SignalPreprocessor, grid_shapes=lambda config, inputs: [(16,)] * len(inputs["signal_values"]),
    ))

An installed package needs no call: it names its bundle in the entry-point group `omni.modalities`,

    [project.entry-points."omni.modalities"]
    signal = "my_package.plugin:signal"

and it is loaded when a configuration first asks for that name. So a broken plug-in does not disturb others.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from omni.modality import ENTRY_POINT_GROUP, Modality

_builtin: dict[str, EntryPoint] = {}
_registered: dict[str, Modality] = {}
_origins: dict[str, str] = {}
_listeners: list[Callable[[], None]] = []


def register_modality(modality: Modality) -> Modality:
    """Add a modality and return it.

    Raises:
        ValueError: another modality has the same name, placeholder, input or argument of the processor.
    """
    _add(modality)
    return modality


def declare_builtin(name: str, value: str) -> None:
    """Declare a modality of omni itself as "module:attribute". Like an entry point, it is loaded when it is needed."""
    _builtin[name] = EntryPoint(name=name, value=value, group=ENTRY_POINT_GROUP)


def _add(modality: Modality, entry_point: str | None = None) -> None:
    if not isinstance(modality, Modality):
        found = f"{type(modality).__name__} ({entry_point})" if entry_point else type(modality).__name__
        raise ValueError(f"Expected an omni.Modality, found {found}.")
    if modality.name in _registered or (entry_point is None and modality.name in _entry_points()):
        origin = modalities()[modality.name]
        raise ValueError(f"The modality {modality.name!r} exists already ({origin}); names are unique. Choose another.")
    for other in _registered.values():
        taken = [modality.token] if modality.token == other.token else []
        taken += [modality.argument] if modality.argument == other.argument else []
        taken += sorted(set(modality.inputs) & set(other.inputs))
        if taken:
            raise ValueError(
                f"The modality {modality.name!r} wants {', '.join(map(repr, taken))}, which belongs to {other.name!r}; "
                "placeholders, inputs and arguments must tell modalities apart."
            )
    if "config_class" in vars(modality):  # if it is given as text, its package fills the tables
        _tell_transformers(modality)
    _registered[modality.name] = modality
    _origins[modality.name] = entry_point or f"registered by {modality.model_class.__module__}"
    for listener in _listeners:
        listener()


def _tell_transformers(modality: Modality) -> None:
    """Register the encoder with AutoConfig and AutoModel. transformers' own configurations keep their models."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    config_class, model_type = modality.config_class, modality.config_class.model_type
    known = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else config_class  # noqa: SIM401, a lazy mapping
    if (known.__module__, known.__qualname__) != (config_class.__module__, config_class.__qualname__):
        raise ValueError(
            f"The model_type {model_type!r} of {config_class.__module__}.{config_class.__qualname__} belongs to "
            f"{known.__module__}.{known.__qualname__}; choose another."
        )
    if not config_class.__module__.startswith("transformers."):
        AutoConfig.register(model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, modality.model_class, exist_ok=True)


def get_modality(name: str) -> Modality:
    """The modality of this name. It is loaded from its entry point if needed.

    Raises:
        ValueError: there is no such modality (the message lists the known ones), or its plug-in cannot be loaded.
    """
    if name not in _registered:
        found = _entry_points().get(name)
        if found is None:
            raise ValueError(
                f"Unknown modality {name!r}; known: {sorted({*_registered, *_entry_points()})}. Install the package that "
                "brings it, or call omni.register_modality(...) first."
            )
        try:
            modality = found.load()
        except Exception as error:
            raise ValueError(
                f"The plug-in of modality {name!r} ({_described(found)}) cannot be loaded: {error}"
            ) from error
        if isinstance(modality, Modality) and modality.name != name:
            raise ValueError(f"The entry point {name!r} ({_described(found)}) holds the modality {modality.name!r}.")
        if _registered.get(name) is not modality:  # another thread may have added it meanwhile
            _add(modality, _described(found))
    return _registered[name]


def open_item(name: str) -> Callable[..., Any]:
    """The function that opens files of a modality; see `Modality.open`.

    Raises:
        ValueError: there is no such modality, or it opens no files.
    """
    opened = get_modality(name).open
    if opened is None:
        raise ValueError(f"The modality {name!r} opens no files; its plug-in has to say how, as `open`.")
    return opened


def prepare_items(
    modality: Modality, preprocessor: Any, items: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The batch of a modality's inputs from raw items. If the preprocessor uses other names, they are mapped in order.

    Args:
        modality: the bundle of the items' modality.
        preprocessor: of the registered class, or one of transformers.
        items: in the order of the batch.
        options: of the preprocessor's call, such as `return_tensors`.

    Raises:
        ValueError: the preprocessor makes fewer or more tensors than the encoder reads, or does not take these items.
    """
    if modality.prepare is not None:
        return dict(modality.prepare(preprocessor, items, options))
    made = preprocessor(items, **options)
    declared = getattr(preprocessor, "model_input_names", modality.inputs)
    others = [key for key in declared if key in made and key not in modality.inputs]
    pairs = {key: key for key in modality.inputs if key in made}
    pairs |= zip((key for key in modality.inputs if key not in made), others, strict=False)
    if len(pairs) < len(modality.inputs) or {*pairs.values()} != {*made}:
        raise ValueError(
            f"{type(preprocessor).__name__} made {sorted(made)}, and the modality {modality.name!r} reads "
            f"{list(modality.inputs)}; its plug-in has to say which is which, as `prepare`."
        )
    return {key: made[pairs[key]] for key in modality.inputs}


def make_probes(modality: Modality, config: Any, preprocessor: Any) -> list[Any]:
    """A few made-up items for an encoder, see `Modality.probes`.

    Raises:
        ValueError: the modality has no `probes`.
    """
    if modality.probes is None:
        raise ValueError(
            f"The modality {modality.name!r} makes no items to try an encoder with; its plug-in has to say how, as `probes`."
        )
    return list(modality.probes(config, preprocessor))


def load_modalities() -> tuple[list[Modality], list[str]]:
    """All modalities, and the names of those whose plug-ins cannot be loaded."""
    found, broken = list[Modality](), list[str]()
    for name in modalities():
        try:
            found.append(get_modality(name))
        except ValueError:
            broken.append(name)
    return found, broken


def modalities() -> dict[str, str]:
    """The names of all modalities, registered or installed, and where each comes from. Nothing is loaded."""
    origins = {name: _described(found) for name, found in _entry_points().items()} | _origins
    return {name: origins[name] for name in sorted(origins)}


def registered() -> tuple[Modality, ...]:
    """The modalities that are loaded, sorted by name."""
    return tuple(_registered[name] for name in sorted(_registered))


def on_change(listener: Callable[[], None]) -> None:
    """Call `listener` now, and again whenever the registered modalities change."""
    _listeners.append(listener)
    listener()


@contextmanager
def temporary() -> Iterator[None]:
    """Undo registrations at the end of the block, for tests and notebooks. The Auto classes keep theirs."""
    before, origins = dict(_registered), dict(_origins)
    try:
        yield
    finally:
        for current, saved in ((_registered, before), (_origins, origins)):
            current.clear()
            current.update(saved)  # type: ignore[arg-type]
        for listener in _listeners:
            listener()


@cache
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of the packages on this path. Finding them takes milliseconds, so it is done once."""
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _entry_points() -> dict[str, EntryPoint]:
    found = dict(_builtin)
    for entry_point in _installed(tuple(sys.path)):
        other = found.setdefault(entry_point.name, entry_point)
        if other.value != entry_point.value:
            raise ValueError(
                f"Two installed packages bring a modality {entry_point.name!r}: {other.value} and {entry_point.value}. "
                "Uninstall one of them."
            )
    return found


def _described(entry_point: EntryPoint) -> str:
    package = entry_point.dist
    return f"entry point {entry_point.value} of {f'{package.name} {package.version}' if package else 'omni'}"

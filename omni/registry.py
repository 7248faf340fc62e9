"""The registry: one frozen bundle per modality, one call to add it, and discovery of those that other packages bring.

    from omni import Modality, register_modality

    register_modality(Modality(
        name="signal", token="<signal>", inputs=("signal_values",), config_class=SignalConfig, model_class=SignalEncoder,
        preprocessor_class=SignalPreprocessor, grid_shapes=lambda config, inputs: [(16,)] * len(inputs["signal_values"]),
    ))

An installed package needs no call: it names its bundle in the entry-point group `omni.modalities`,

    [project.entry-points."omni.modalities"]
    signal = "my_package.plugin:signal"

and it is loaded when a configuration first asks for that name, so a broken plug-in breaks nobody else.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol

ENTRY_POINT_GROUP = "omni.modalities"
CLASSES = ("config_class", "model_class", "preprocessor_class")

GridShapes = Callable[[Any, Mapping[str, Any]], list[tuple[int, ...]]]

ItemProblem = Literal["missing", "truncated", "too large", "unreadable"]


class ItemError(ValueError):
    """A file that does not become an item. The message is one sentence: which, what was expected and found, what to do.

    `kind` belongs to the class, as a worker of a `DataLoader` hands on the class and the message of an error alone.
    """

    kind: ItemProblem = "unreadable"


def is_one_item(given: Any) -> bool:
    """Whether what the processor is given is an item, and not several: lists and tuples hold items."""
    return not isinstance(given, (list, tuple))


def read_named_outputs(encoded: Any, num_patches: int) -> dict[str, Any]:
    """The contract of an encoder's output: attributes `cls` float[B, 1, D] and/or `grid` float[B, N, D]."""
    return {name: getattr(encoded, name) for name in ("cls", "grid") if getattr(encoded, name, None) is not None}


class Packed(Protocol):
    """An encoder together with its preprocessor, packed for speed: the same tokens, up to rounding.

    Attributes:
        path: how it computes, in a word for reports.
    """

    path: str

    def read(self, source: Any, at_least: int | None = None) -> tuple[Any, tuple[int, int], str | None]:
        """An item from its file, in a form that `prepare` takes; the size that it has in full; a note of the decoder.

        Args:
            source: the file.
            at_least: read no more of it than is needed for so many pixels a side.
        """

    def prepare(self, item: Any) -> Any:
        """One item as an array, in the form that `__call__` takes; all are of one shape."""

    def __call__(self, prepared: Any, cls_only: bool = False) -> Any:
        """A tensor of B prepared items -> the encoder's output; of CLS alone if nothing else is wanted."""


@dataclass(frozen=True, kw_only=True)
class Modality:
    """Everything that omni has to know of a kind of input.

    Attributes:
        name: an identifier such as "image". It names the parts of the fused model: `image_tower`, `image_projector`,
            `get_image_features`, and in the configuration `image_config`, `image_token_id`.
        token: the placeholder that stands for one item in a prompt, such as "<image>".
        inputs: the batch keys that the encoder reads, each with the argument of its forward: `{"video_values":
            "pixel_values"}`; of names alone, `("signal_values",)`, key and argument are the same. The first axis of each
            counts items, over all rows.
        config_class: the configuration class of the default encoder. This class and the next two may be named, as
            "package.module:Class"; then they are imported when they are first used, and it is for the package to put them
            into the Auto tables of transformers.
        model_class: its model, a `PreTrainedModel` whose output `read` understands. A tower with a configuration of this
            very class is built from it, one with another by `build`.
        preprocessor_class: turns raw items into `inputs`: `__call__(items, return_tensors=...)`, `to_dict()`,
            `cls(**dict)` and `model_input_names` (in the order of `inputs`).
        build: from a configuration of another class the tower, which takes the same arguments; by default `AutoModel`'s.
        prepare: from a preprocessor, items and the options of the call the batch of `inputs`, where a preprocessor of
            transformers takes other items or makes other names.
        grid_shapes: from the encoder's configuration and the batch of `inputs`, the shape of each item's grid of
            tokens: `(14, 14)` for a picture of 14 x 14 patches, `(16,)` for a signal of 16 frames. Their product is N.
        grid_dims: axes of that grid: 2 for pictures, 1 for signals.
        outputs: which named outputs may be handed to the projector.
        read: from the encoder's output and N, the named tensors `cls` float[B, 1, D] and `grid` float[B, N, D].
        argument: the processor's argument for the items; "images" for "image".
        is_item: tells an item from a list of items; a sound may be a tuple `(array, rate)`.
        open: from a path or the bytes of a file to an item; raises `ItemError`. With it, whatever takes files takes this
            modality.
        suffixes: of its files, in small letters: `(".png", ".jpg")`.
        media_types: of its uploads: `("image/png", "image/*")`.
        noun: what messages call an item: "picture".
        show: an item as a picture of PIL, for sheets and pages.
        stand_ins: for an item and a seed others in its place that tell nothing of it, `{"blank": ..., "noise": ...}`; an
            evaluation asks with them whether the item is used at all.
        probes: from an encoder's configuration and its preprocessor a few made-up items of different sizes or lengths. What
            takes any encoder (`compose`, `embed`, `export`) tries it with them.
        pack: from an encoder, its preprocessor and a precision (`torch.dtype`) a faster form of the two, or None where there
            is none for them; see `Packed`.
    """

    name: str
    token: str
    inputs: Mapping[str, str] | tuple[str, ...]
    config_class: Any
    model_class: Any
    preprocessor_class: Any
    grid_shapes: GridShapes
    build: Callable[[Any], Any] | None = None
    prepare: Callable[[Any, Sequence[Any], Mapping[str, Any]], Mapping[str, Any]] | None = None
    grid_dims: int = 1
    outputs: tuple[str, ...] = ("cls", "grid", "cls+grid")
    read: Callable[[Any, int], dict[str, Any]] = read_named_outputs
    argument: str = ""
    is_item: Callable[[Any], bool] = is_one_item
    open: Callable[..., Any] | None = None
    suffixes: tuple[str, ...] = ()
    media_types: tuple[str, ...] = ()
    noun: str = "item"
    show: Callable[[Any], Any] | None = None
    stand_ins: Callable[[Any, int], Mapping[str, Any]] | None = None
    probes: Callable[[Any, Any], Sequence[Any]] | None = None
    pack: Callable[[Any, Any, Any], Packed | None] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", self.name):
            raise ValueError(f"A modality's name is a lower-case identifier such as 'image', found {self.name!r}.")
        if self.name in ("text", "language", "lm"):
            raise ValueError(f"The name {self.name!r} belongs to the language model; choose another.")
        if not self.token or self.token != self.token.strip():
            raise ValueError(
                f"The placeholder of {self.name!r} must be text without spaces around, found {self.token!r}."
            )
        if not self.inputs:
            raise ValueError(f"The modality {self.name!r} names no inputs; its encoder must read at least one.")
        if not set(self.outputs) <= {"cls", "grid", "cls+grid"} or not self.outputs:
            raise ValueError(f"The outputs of {self.name!r} are some of cls, grid, cls+grid; found {self.outputs}.")
        if wrong := [each for each in self.suffixes if not re.fullmatch(r"\.[a-z0-9]+", each)]:
            raise ValueError(f"The suffixes of {self.name!r} look like '.wav', in small letters; found {wrong}.")
        if not self.argument:
            object.__setattr__(self, "argument", f"{self.name}s")

        fields = vars(self)
        fields["_named"] = {name: fields.pop(name) for name in CLASSES if isinstance(fields[name], str)}

    def __getattr__(self, name: str) -> Any:
        if name not in vars(self).get("_named", {}):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        vars(self)[name] = EntryPoint(name=name, value=self._named[name], group=ENTRY_POINT_GROUP).load()
        return vars(self)[name]

    @property
    def arguments(self) -> dict[str, str]:
        """For each batch key the argument of the encoder's forward."""
        return dict(self.inputs) if isinstance(self.inputs, Mapping) else {key: key for key in self.inputs}


_builtin: dict[str, EntryPoint] = {}
_registered: dict[str, Modality] = {}
_origins: dict[str, str] = {}
_listeners: list[Callable[[], None]] = []


def register_modality(modality: Modality) -> Modality:
    """Add a modality and return it.

    Raises:
        ValueError: the name, the placeholder, an input or the processor's argument belongs to another modality already.
    """
    _add(modality)
    return modality


def declare_builtin(name: str, value: str) -> None:
    """Name a modality that omni itself brings, as "module:attribute"; loaded like an entry point, when asked for."""
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
    if "config_class" in vars(modality):  # one that is only named is in its tables already
        _tell_transformers(modality)
    _registered[modality.name] = modality
    _origins[modality.name] = entry_point or f"registered by {modality.model_class.__module__}"
    for listener in _listeners:
        listener()


def _tell_transformers(modality: Modality) -> None:
    """Have AutoConfig and AutoModel know the encoder; what they make of transformers' own configurations stays."""
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
    """The modality of this exact name, loaded from its entry point if need be.

    Raises:
        ValueError: no such modality; the message lists the known ones. Or its plug-in cannot be loaded.
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
        if _registered.get(name) is not modality:  # another thread may have been sooner
            _add(modality, _described(found))
    return _registered[name]


def open_item(name: str) -> Callable[..., Any]:
    """How files of a modality are opened, see `Modality.open`.

    Raises:
        ValueError: no such modality, or one that has no files.
    """
    opened = get_modality(name).open
    if opened is None:
        raise ValueError(f"The modality {name!r} opens no files; its plug-in has to say how, as `open`.")
    return opened


def modalities() -> dict[str, str]:
    """Names of all modalities, registered or discovered, and where each comes from; nothing is loaded."""
    origins = {name: _described(found) for name, found in _entry_points().items()} | _origins
    return {name: origins[name] for name in sorted(origins)}


def registered() -> tuple[Modality, ...]:
    """The modalities loaded so far, sorted by name."""
    return tuple(_registered[name] for name in sorted(_registered))


def on_change(listener: Callable[[], None]) -> None:
    """Call `listener` now and whenever the registered modalities change."""
    _listeners.append(listener)
    listener()


@contextmanager
def temporary() -> Iterator[None]:
    """Registrations made inside the block are undone at its end (Auto classes keep theirs); for tests and notebooks."""
    before, origins = dict(_registered), dict(_origins)
    try:
        yield
    finally:
        for current, saved in ((_registered, before), (_origins, origins)):
            current.clear()
            current.update(saved)  # type: ignore[arg-type]
        for listener in _listeners:
            listener()


def _entry_points() -> dict[str, EntryPoint]:
    found = dict(_builtin)
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
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

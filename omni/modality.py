"""A modality is one frozen bundle: everything that omni has to know about a kind of input.

The fields name its encoder, its preprocessor, its placeholder, and how its files are opened. The registry holds the bundles
(`omni.registry`). The fused model and the commands know modalities through their bundles alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, Literal, Protocol

ENTRY_POINT_GROUP = "omni.modalities"
CLASSES = ("config_class", "model_class", "preprocessor_class")

GridShapes = Callable[[Any, Mapping[str, Any]], list[tuple[int, ...]]]

ItemProblem = Literal["missing", "truncated", "too large", "unreadable"]


class ItemError(ValueError):
    """A file cannot become an item. The message is one sentence: which file, what was expected and found, what to do.

    `kind` belongs to the class, because a worker of a `DataLoader` passes on only the class and the message of an error.
    """

    kind: ItemProblem = "unreadable"


class MissingItemError(ItemError):
    """There is no such file."""

    kind = "missing"


class LargeItemError(ItemError):
    """The file, or what it holds, is larger than it may be."""

    kind = "too large"


def is_one_item(given: Any) -> bool:
    """Whether an argument of the processor is one item. Lists and tuples hold several."""
    return not isinstance(given, (list, tuple))


def read_named_outputs(encoded: Any, num_patches: int) -> dict[str, Any]:
    """The tokens of an encoder whose output has the attributes `cls` float[B, 1, D] and/or `grid` float[B, N, D]."""
    return {name: getattr(encoded, name) for name in ("cls", "grid") if getattr(encoded, name, None) is not None}


class Packed(Protocol):
    """An encoder and its preprocessor in a faster form, with the same tokens up to rounding.

    Attributes:
        path: one word that says how it computes, for reports.
    """

    path: str

    def read(self, source: Any, at_least: int | None = None) -> tuple[Any, tuple[int, int], str | None]:
        """Read an item from its file.

        Args:
            source: the file.
            at_least: the item may be read smaller, if both sides keep so many pixels.

        Returns:
            The item in a form that `prepare` takes, its full size, and a note if the decoder warned.
        """

    def prepare(self, item: Any) -> Any:
        """One item as an array. All arrays have one shape; `__call__` takes a batch of them."""

    def __call__(self, prepared: Any, cls_only: bool = False) -> Any:
        """From a tensor of B prepared items to the encoder's output; with `cls_only`, to that of CLS alone."""


@dataclass(frozen=True, kw_only=True)
class Modality:
    """Everything that omni has to know about a kind of input.

    Attributes:
        name: an identifier such as "image". It names the parts of the fused model: `image_tower`, `image_projector`,
            `get_image_features`, and in the configuration `image_config`, `image_token_id`.
        token: the placeholder that stands for one item in a prompt, such as "<image>".
        inputs: the batch keys that the encoder reads, each with the argument of its forward: `{"video_values":
            "pixel_values"}`. In a tuple of names, `("signal_values",)`, key and argument are the same. The first axis of
            each counts items, over all rows.
        config_class: the configuration class of the default encoder. This class and the next two may be given as text,
            "package.module:Class". They are then imported when they are first used, and the package itself must put them
            into the Auto tables of transformers.
        model_class: the encoder's class, a `PreTrainedModel` whose output `read` understands. It builds a tower from a
            configuration of `config_class` itself; `build` builds all others.
        preprocessor_class: turns raw items into `inputs`: `__call__(items, return_tensors=...)`, `to_dict()`,
            `cls(**dict)` and `model_input_names`: those of `inputs`, or others in their order.
        build: takes a configuration of another class and returns a tower that takes the same arguments; by default
            `AutoModel` does.
        prepare: takes a preprocessor, items and the options of the call, and returns the batch of `inputs`. It is for a
            preprocessor of transformers that takes other items or makes other names.
        grid_shapes: takes the encoder's configuration and the batch of `inputs`, and returns the shape of each item's grid
            of tokens: `(14, 14)` for a picture of 14 x 14 patches, `(16,)` for a signal of 16 frames. Their product is N.
        grid_dims: the number of axes of that grid: 2 for pictures, 1 for signals.
        outputs: the outputs that a projector may read.
        read: takes the encoder's output and N, and returns the tensors `cls` float[B, 1, D] and `grid` float[B, N, D].
        argument: the processor's argument for the items; "images" for "image".
        is_item: tells one item from a list of items; a sound may be a tuple `(array, rate)`.
        open: takes a path or the bytes of a file and returns an item, or raises `ItemError`. With it, every command that
            takes files takes this modality.
        suffixes: the suffixes of its files, in small letters: `(".png", ".jpg")`.
        media_types: of its uploads: `("image/png", "image/*")`.
        measure: from the bytes of a file how many `unit`s it says it holds, without decoding it; 0 where it says nothing.
            A server bounds with it what strangers have it decode.
        unit: what `measure` counts, in the plural: "pixels".
        noun: what messages call an item: "picture".
        show: an item as a picture of PIL, for sheets and pages.
        stand_ins: for an item and a seed others in its place that tell nothing of it, `{"blank": ..., "noise": ...}`; an
            evaluation asks with them whether the item is used at all.
        probes: from an encoder's configuration and its preprocessor a few made-up items of different sizes or lengths. What
            takes any encoder (`compose`, `embed`, `export`, `serve`) tries it with them.
        content: what an item holds, as bytes: two items with the same are the same item, however they are stored.
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
    measure: Callable[[bytes], int] | None = None
    unit: str = ""
    noun: str = "item"
    show: Callable[[Any], Any] | None = None
    stand_ins: Callable[[Any, int], Mapping[str, Any]] | None = None
    probes: Callable[[Any, Any], Sequence[Any]] | None = None
    content: Callable[[Any], bytes] | None = None
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

    def build_tower(self, config: Any) -> Any:
        """The encoder of a configuration: ours from `model_class`, another by `build`."""
        if type(config) is self.config_class:
            return self.model_class(config)
        if self.build is not None:
            return self.build(config)
        from transformers import AutoModel

        return AutoModel.from_config(config)

    @property
    def arguments(self) -> dict[str, str]:
        """For each batch key the argument of the encoder's forward."""
        return dict(self.inputs) if isinstance(self.inputs, Mapping) else {key: key for key in self.inputs}

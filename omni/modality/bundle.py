"""A modality is one frozen bundle: its encoder, its preprocessor, its placeholder, and how its files are opened.

`omni.registry` holds the bundles. The fused model and the commands know modalities through their bundles alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

from .checks import expect_valid
from .packed import Packed

ENTRY_POINT_GROUP = "omni.modalities"
CLASSES = ("config_class", "model_class", "preprocessor_class")


def is_one_item(given: Any) -> bool:
    """Whether an argument of the processor is one item. Lists and tuples hold several."""
    return not isinstance(given, (list, tuple))


def read_named_outputs(encoded: Any, num_patches: int) -> dict[str, Any]:
    """The tokens of an encoder whose output has the attributes `cls` float[B, 1, D] and/or `grid` float[B, N, D]."""
    return {name: getattr(encoded, name) for name in ("cls", "grid") if getattr(encoded, name, None) is not None}


@dataclass(frozen=True, kw_only=True)
class Modality:
    """Everything that omni needs to know about a kind of input.

    Attributes:
        name: an identifier such as "image". It names the parts of the fused model: `image_tower`, `image_projector`,
            `get_image_features`, and in the configuration `image_config`, `image_token_id`.
        token: the placeholder that stands for one item in a prompt, such as "<image>".
        inputs: the batch keys that the encoder reads, each with the argument of its forward: `{"video_values":
            "pixel_values"}`. In a tuple of names, `("signal_values",)`, key and argument are the same. The first axis of
            each counts items, over all rows.
        config_class: the configuration class of the default encoder. This class and the next two may be given as text,
            "package.module:Class", and are then imported when they are first used; the package itself must put them into
            the Auto tables of transformers.
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
        suffixes, media_types: those of its files, in lower case: `(".png",)` and `("image/png", "image/*")`.
        measure: takes the bytes of a file, and returns the number of `unit`s that its header states, without decoding it;
            0 if it states none. A server uses it to limit the size of uploads.
        unit: what `measure` counts, in the plural: "pixels".
        noun: what messages call an item: "picture".
        show: takes an item and returns a picture of PIL, for sheets and pages.
        stand_ins: takes an item and a seed, and returns items without its content, `{"blank": ..., "noise": ...}`. An
            evaluation puts them in its place, to see whether the model uses the item at all.
        probes: takes an encoder's configuration and its preprocessor, and returns a few made-up items of different sizes or
            lengths. Commands that take any encoder (`compose`, `embed`, `export`, `serve`) try it with them.
        content: takes an item and returns its content as bytes. Two items with the same bytes are the same item.
        pack: takes an encoder, its preprocessor and a precision (`torch.dtype`), and returns a faster form of the two, see
            `Packed`; or None if there is none.
    """

    name: str
    token: str
    inputs: Mapping[str, str] | tuple[str, ...]
    config_class: Any
    model_class: Any
    preprocessor_class: Any
    grid_shapes: Callable[[Any, Mapping[str, Any]], list[tuple[int, ...]]]
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
        expect_valid(self)
        fields = vars(self)
        fields["argument"] = self.argument or f"{self.name}s"
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

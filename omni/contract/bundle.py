"""Checks of the bundle alone: its fields, its configuration, how its files are opened, how its items are prepared."""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig

from omni.contract.checks import BrokenError, Check, NotOfferedError, NotRunError
from omni.contract.subject import Subject
from omni.fusion.processing_omni import OmniProcessor
from omni.modality import ItemError
from omni.registry import get_modality, modalities, register_modality, registered


def registers(subject: Subject) -> None:
    """The bundle registers beside all other installed plug-ins: two of them may meet in one model."""
    for name in modalities():
        if name != subject.name:
            try:
                get_modality(name)
            except ValueError:  # another plug-in is broken, not this one
                continue
    if subject.modality in registered():
        return
    try:
        register_modality(subject.modality)
    except ValueError as error:
        raise BrokenError(str(error)) from error


def fields_agree(subject: Subject) -> None:
    """Fields that need each other are set together."""
    modality = subject.modality
    for other in registered():
        if other.name != modality.name and (other.token in modality.token or modality.token in other.token):
            raise BrokenError(
                f"The placeholder {modality.token!r} and {other.token!r} of {other.name!r} contain one another, so one is "
                "found inside the other; choose another `token`."
            )
    if not modality.argument.isidentifier():
        raise BrokenError(
            f"`argument` is {modality.argument!r}, expected a Python identifier; rename it, or leave it out."
        )
    given = [field for field in ("suffixes", "media_types") if getattr(modality, field)]
    if modality.open is None and given:
        raise BrokenError(f"The bundle has {' and '.join(given)}, but nothing opens such files; add `open`.")
    if modality.open is not None and not modality.suffixes:
        raise BrokenError("The bundle has `open`, but no file is known to be its own; add `suffixes`.")
    if wrong := [kind for kind in modality.media_types if not re.fullmatch(r"[a-z]+/(\*|[a-z0-9.+-]+)", kind)]:
        raise BrokenError(f"`media_types` look like 'image/png' or 'image/*', found {wrong[0]!r}; correct it.")
    if modality.grid_dims < 1:
        raise BrokenError(
            f"`grid_dims` is {modality.grid_dims}, expected the number of axes of the grid, at least 1; correct it."
        )
    names = list(getattr(modality.preprocessor_class, "model_input_names", modality.inputs))
    if modality.prepare is None and len(names) < len(modality.inputs):
        raise BrokenError(
            f"`inputs` names {list(modality.inputs)}, but the preprocessor's model_input_names are {names}; name as many, "
            "in the same order."
        )


def configures(subject: Subject) -> None:
    """Every setting is the same after saving and loading."""
    config_class = subject.modality.config_class
    is_configuration = isinstance(config_class, type) and issubclass(config_class, PreTrainedConfig)
    if not is_configuration:
        raise BrokenError(f"`config_class` is {config_class!r}, expected a PreTrainedConfig; derive it from that.")
    if not config_class.model_type:
        raise BrokenError(f"{config_class.__name__} has no `model_type`; give it a name that no other model has.")
    config = config_class()
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise BrokenError(
            f"{config_class.__name__} has no `hidden_size`, the width of its tokens, which the projector asks for; add it."
        )
    inherited = set(PreTrainedConfig().to_dict())
    settings = {key: value for key, value in config.to_dict().items() if key not in inherited}
    taken = {field.name for field in fields(config_class)} if is_dataclass(config_class) else set[str]()
    taken |= set(inspect.signature(config_class).parameters)
    _comes_back(config)
    for key, value in settings.items():
        if type(value) not in (int, float):
            continue
        try:
            made = config_class(**{key: 2 * value})
        except Exception:  # refusing a value is no fault
            continue
        if key in taken and getattr(made, key) != 2 * value:
            raise BrokenError(
                f"{config_class.__name__}({key}={2 * value}) has {key} {getattr(made, key)!r}; keep what is given."
            )
        _comes_back(made)


def _comes_back(config: Any) -> None:
    name, saved = type(config).__name__, config.to_dict()
    try:
        loaded = type(config).from_dict(json.loads(json.dumps(config.to_diff_dict()))).to_dict()
    except Exception as error:
        raise BrokenError(
            f"{name} cannot be made from what it saves ({type(error).__name__}: {error}); take every key of `to_dict()`."
        ) from error
    apart = [key for key in {**saved, **loaded} if _plain(saved.get(key)) != _plain(loaded.get(key))]
    if apart := [key for key in apart if key not in ("_name_or_path", "transformers_version")]:
        raise BrokenError(
            f"{name} does not come back from what it saves: {apart[0]} is {saved.get(apart[0])!r}, and then "
            f"{loaded.get(apart[0])!r}; let __init__ keep values as they are given, and compute others from them later."
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def has_items(subject: Subject) -> None:
    """There are items for the checks."""
    if not subject.items:
        raise BrokenError(
            "There is no item to try the bundle with; add `probes`, which makes up a few of different sizes, to it"
            + (", or pass files with --file." if subject.modality.open else ".")
        )


def tells_items_from_lists(subject: Subject) -> None:
    """`is_item` tells one item from lists of items, flat or by row."""
    is_item = subject.modality.is_item
    first, second = subject.items[:2]
    for item in subject.items:
        if not is_item(item):
            raise BrokenError(
                f"`is_item` takes an item, a {type(item).__name__}, for several; let it be true of "
                + ("tuples that are one item." if isinstance(item, tuple) else "it.")
            )
    for several in ([first, second], (first, second), [[first], [second]]):
        if is_item(several):
            raise BrokenError(
                f"`is_item` takes a {type(several).__name__} of items for one item; let it be false of lists and tuples of "
                "them."
            )


# --- Files ------------------------------------------------------------------------------------------------------------

GAINS_FILES = "`open`: with it, every command that takes files takes this modality"


def refuses_bad_files(subject: Subject) -> None:
    """`open` raises an `ItemError` for every bad file."""
    modality = subject.modality
    if modality.open is None:
        raise NotOfferedError(f"{GAINS_FILES}.")
    folder = subject.folder("files")
    missing, empty = folder / f"missing{modality.suffixes[0]}", folder / f"empty{modality.suffixes[0]}"
    garbage = folder / f"garbage{modality.suffixes[0]}"
    noise = bytes(range(256)) * 8
    empty.write_bytes(b"")
    garbage.write_bytes(noise)
    kind = _kind(subject, "a missing file", str(missing))
    if kind != "missing":
        raise BrokenError(
            f"`open` of a missing file raises an ItemError of kind {kind!r}, expected 'missing'; raise a subclass with "
            '`kind = "missing"`.'
        )
    for what, source in (
        ("an empty file", str(empty)),
        ("a file of another kind", str(garbage)),
        ("the path of a file of another kind as a Path", garbage),
        ("bytes of another kind", noise),
        ("a folder", str(folder)),
    ):
        _kind(subject, what, source)
    try:
        modality.open(object())
    except (TypeError, ItemError):
        return
    except Exception as error:
        raise BrokenError(
            f"`open` of an object that is neither path nor bytes raises {type(error).__name__}; raise TypeError."
        ) from error
    raise BrokenError("`open` takes an object that is neither path nor bytes for a file; raise TypeError.")


def _kind(subject: Subject, what: str, source: Any) -> str:
    """The kind of the `ItemError` that `open` raises for a bad file."""
    assert subject.modality.open is not None
    try:
        subject.modality.open(source)
    except ItemError as error:
        return error.kind
    except Exception as error:
        raise BrokenError(
            f"`open` of {what} raises {type(error).__name__} ({error}), expected an omni.modality.ItemError of one "
            "sentence; raise that."
        ) from error
    raise BrokenError(f"`open` makes an item of {what}; raise an omni.modality.ItemError that says what was expected.")


def opens_files(subject: Subject) -> None:
    """`open` makes the same item of a path and of the file's bytes."""
    modality = subject.modality
    if modality.open is None:
        raise NotOfferedError(f"{GAINS_FILES}.")
    if not subject.files:
        raise NotRunError("There is no file to open; pass one with --file.")
    for file in subject.files:
        if not file.name.lower().endswith(modality.suffixes):
            raise BrokenError(f"{file.name!r} does not end with one of {', '.join(modality.suffixes)}; add its suffix.")
        opened = [modality.open(source) for source in (str(file), file, file.read_bytes())]
        made = [subject.prepare([item]) for item in opened]
        if not all(_equal(made[0], other) for other in made):
            raise BrokenError(
                f"`open` of {file.name!r} makes another item of its bytes than of its path; read both alike."
            )


# --- The preprocessor -------------------------------------------------------------------------------------------------


def prepares(subject: Subject) -> None:
    """The preprocessor prepares all items, in order, with the same result every time."""
    modality, items = subject.modality, subject.items
    inputs = subject.prepare(items)
    if lacking := [key for key in modality.inputs if key not in inputs]:
        raise BrokenError(f"The preprocessor makes {sorted(inputs)}, but `inputs` names {lacking[0]!r}; make it, too.")
    for key in modality.inputs:
        if not isinstance(inputs[key], torch.Tensor):
            raise BrokenError(
                f"With return_tensors='pt' the preprocessor makes {key} a {type(inputs[key]).__name__}, expected a tensor; "
                "return BatchFeature(data, tensor_type=return_tensors)."
            )
        if len(inputs[key]) != len(items):
            raise BrokenError(
                f"Of {len(items)} items the preprocessor makes {len(inputs[key])} of {key}; the first axis counts items, so "
                "keep every one of them."
            )
    if not _equal(inputs, subject.prepare(items)):
        raise BrokenError(
            "The preprocessor makes other tensors of the same items the second time; remove randomness and state from it."
        )
    for number, item in enumerate(items):  # padding may differ, the values may not
        alone = subject.prepare([item])
        for key in modality.inputs:
            there, here = inputs[key][number], alone[key][0]
            if there.shape == here.shape and not torch.allclose(there.double(), here.double()):
                raise BrokenError(
                    f"The preprocessor makes another {key} of item {number + 1} in a batch than of that item alone; keep "
                    "their order, and let no item depend on the others."
                )
    if (made := subject.probes()) and not _equal(subject.prepare(made), subject.prepare(subject.probes())):
        raise BrokenError("`probes` makes other items the second time; give its generator a fixed seed.")


OF_FILES = ("auto_map", "preprocessor_class")
"""Keys in a file that say where a class is found. They are no settings."""


def keeps_settings(subject: Subject) -> None:
    """The preprocessor is the same after saving and loading, which is `cls(**to_dict())`."""
    cls, processor = subject.modality.preprocessor_class, subject.processor
    saved = processor.preprocessors[subject.name].to_dict()
    known = inspect.signature(cls).parameters.values()
    named = [each.name for each in known if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    if lost := [name for name in named if name not in saved]:
        raise BrokenError(f"to_dict() of {cls.__name__} lacks {lost[0]!r}, so a checkpoint forgets it; add it.")
    folder = subject.folder("processor")
    processor.save_pretrained(folder)
    loaded = OmniProcessor.from_pretrained(folder)
    again = loaded.preprocessors[subject.name].to_dict()
    apart = [key for key in {**saved, **again} if _plain(saved.get(key)) != _plain(again.get(key))]
    if apart := [key for key in apart if key not in OF_FILES]:
        raise BrokenError(
            f"{cls.__name__} does not come back from to_dict(): {apart[0]} is {saved.get(apart[0])!r}, and then "
            f"{again.get(apart[0])!r}; let __init__ take what to_dict() gives."
        )
    if not _equal(subject.prepare(subject.items), subject.prepare(subject.items, loaded)):
        raise BrokenError(
            f"A saved and loaded {cls.__name__} makes other tensors; let to_dict() hold all that it uses."
        )


def _equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first
    )


# --- Optional fields --------------------------------------------------------------------------------------------------


def shows(subject: Subject) -> None:
    """`show` makes pictures for sheets, maps and the page."""
    if subject.modality.show is None:
        raise NotOfferedError("`show`: with it, sheets, maps and the page show an item as a picture.")
    for item in subject.items:
        shown = subject.modality.show(item)
        if not isinstance(shown, Image.Image):
            raise BrokenError(f"`show` returns a {type(shown).__name__}, expected a picture of PIL; draw one.")


SEED = 987654321
"""A seed that `probes` does not use."""


def stands_in(subject: Subject) -> None:
    """`stand_ins` makes items without content. With them an evaluation sees whether answers use their items."""
    modality = subject.modality
    if modality.stand_ins is None:
        raise NotOfferedError("`stand_ins`: with it, `omni evaluate` asks whether the model uses its items at all.")
    for item in subject.items:
        made, again = (dict(modality.stand_ins(item, SEED)) for _ in range(2))
        if missing := {"blank", "noise"} - set(made):
            raise BrokenError(f"`stand_ins` makes {sorted(made)}, and no {min(missing)!r}; make both.")
        own = subject.prepare([item])
        for name, other in made.items():
            if not modality.is_item(other):
                raise BrokenError(f"`stand_ins` makes a {name!r} that `is_item` takes for several; make it one item.")
            prepared = subject.prepare([other])
            if subject.shapes(prepared) != subject.shapes(own):
                raise BrokenError(
                    f"The {name!r} of `stand_ins` has a grid {subject.shapes(prepared)[0]}, and its item "
                    f"{subject.shapes(own)[0]}; make it of the same size."
                )
            if _equal(prepared, own):
                raise BrokenError(f"The {name!r} of `stand_ins` is the item itself; make one that says nothing of it.")
            if not _equal(prepared, subject.prepare([again[name]])):
                raise BrokenError(
                    f"The {name!r} of `stand_ins` differs the second time; let it depend on item and seed alone."
                )


CHECKS = (
    Check("registered", "No other modality has its name, placeholder, inputs, argument or model type.", registers),
    Check("fields", "The fields of the bundle agree with each other.", fields_agree, ("registered",)),
    Check("configuration", "Its configuration comes back from a file as it was.", configures, ("registered",)),
    Check("items", "There are items to try it with.", has_items, ("configuration",)),
    Check("is_item", "One item is told from several.", tells_items_from_lists, ("items",)),
    Check("preprocessor", "All items become tensors, in their order, the same every time.", prepares, ("items",)),
    Check("settings", "The preprocessor comes back from a file as it was.", keeps_settings, ("preprocessor",)),
    Check("bad files", "A file that is no item raises an ItemError.", refuses_bad_files, ("registered", "fields")),
    Check("files", "Files become items, from a path and from bytes.", opens_files, ("preprocessor",)),
    Check("show", "An item can be seen as a picture.", shows, ("items",)),
    Check("stand_ins", "There are items of the same size that say nothing.", stands_in, ("preprocessor",)),
)

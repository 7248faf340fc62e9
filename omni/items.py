"""A file becomes an item of the modality that it belongs to.

    read_item("scene.png")        # Item("image", <PIL.Image>)
    read_item("question.wav")     # Item("audio", Sound(2.10 s at 16,000 Hz))

The suffix says which modality tries first, and the content decides. So a WAV file that is named .png is a sound.
"""

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from os import PathLike, fsdecode
from typing import Any, NamedTuple

from omni.files import ReadError, read_whole
from omni.modality import ItemError, LargeItemError, MissingItemError, Modality
from omni.registry import get_modality, load_modalities

MAX_BYTES = 2**29
"""The largest file without a known suffix, in bytes. Each modality has its own limit for its files."""


class Item(NamedTuple):
    """One input of a model, and the name of its modality."""

    modality: str
    value: Any


def read_item(source: Any, among: Iterable[str] | None = None, name: str | None = None) -> Item:
    """The item in a file.

    Args:
        source: a path, the bytes of a file, an open item such as a picture of PIL, or an `Item`, which stays unchanged.
        among: names of the modalities to try; by default all that open files.
        name: the name of a file whose bytes are given.

    Raises:
        ItemError: none of them can read it. If the suffix belongs to a modality, the message is from that modality.
    """
    if isinstance(source, Item):
        return source
    path = fsdecode(source) if isinstance(source, str | PathLike) else None
    called = path or name or ""
    openers, broken = _openers(among)

    def owns(modality: Modality) -> bool:
        return called.lower().endswith(modality.suffixes)

    owned = any(map(owns, openers))
    nouns = " or ".join(f"a {each.noun}" for each in openers) or "an item"
    if path is not None and not owned:
        _expect_file(path, nouns)
    errors: list[ItemError] = []
    for modality in sorted(openers, key=owns, reverse=True):
        assert modality.open is not None
        try:
            return Item(modality.name, modality.open(source))
        except TypeError:  # another modality's item
            if path is not None or isinstance(source, bytes | bytearray | memoryview):
                raise
        except ItemError as error:
            if error.kind != "unreadable":  # the modality knows the file, or the file is missing
                raise
            errors.append(error)
    if owned:
        raise errors[0]
    reasons = " ".join(map(str, errors)) or f"Expected {nouns}, found {type(source).__name__}; pass a path or bytes."
    unknown = f" The plug-ins of {', '.join(broken)} cannot be loaded." if broken else ""
    raise ItemError(reasons + unknown)


def read_items(sources: Iterable[Any], among: Iterable[str] | None = None) -> list[Item]:
    """The items in several files; see `read_item`."""
    names = None if among is None else list(among)
    return [read_item(source, names) for source in sources]


def suffixes(among: Iterable[str] | None = None) -> tuple[str, ...]:
    """The suffixes of the files that become items."""
    return tuple(suffix for modality in _openers(among)[0] for suffix in modality.suffixes)


def modality_of(media_type: str, among: Iterable[str] | None = None) -> Modality | None:
    """The modality of a media type: "audio/wav" -> audio; None if there is none.

    Args:
        media_type: the media type of an upload, such as "audio/wav" or "audio/*".
        among: names of the modalities to choose from; by default all that open files.
    """
    kind = media_type.lower()
    found = [(len(p), m) for m in _openers(among)[0] for p in m.media_types if fnmatchcase(kind, p)]
    return max(found, key=lambda each: each[0])[1] if found else None


def nouns(items: Sequence[Item]) -> str:
    """A phrase for these items in messages: "picture", "2 sounds", "picture and 2 sounds"."""
    names = list(dict.fromkeys(item.modality for item in items))
    counts = [(sum(item.modality == name for item in items), get_modality(name).noun) for name in names]
    return " and ".join(noun if count == 1 else f"{count} {noun}s" for count, noun in counts)


def can_be_shown(item: Item) -> bool:
    """Whether an item can be shown as a picture with its grid drawn over it: patches, or stretches of time."""
    modality = get_modality(item.modality)
    return modality.show is not None and modality.grid_dims <= 2


def expect_known(items: Iterable[Item], names: Collection[str]) -> None:
    """Refuse items of modalities that a model does not take.

    Raises:
        ItemError: there is such an item.
    """
    if strangers := [item.modality for item in items if item.modality not in names]:
        takes = " and ".join(f"{get_modality(name).noun}s" for name in names) or "text alone"
        raise ItemError(f"This model takes {takes}, found a {get_modality(strangers[0]).noun}; leave it out.")


def _openers(among: Iterable[str] | None) -> tuple[list[Modality], list[str]]:
    """The modalities that open files, and the names of those that cannot be loaded."""
    found, broken = load_modalities() if among is None else ([get_modality(name) for name in among], [])
    return [modality for modality in found if modality.open is not None], broken


def _expect_file(path: str, nouns: str) -> None:
    """Raise `ItemError` if the file cannot be read, whatever its modality."""
    try:
        read_whole(path, "file", nouns, MAX_BYTES)
    except ReadError as error:
        raise said_of_item(error) from error


def said_of_item(error: ReadError) -> ItemError:
    """The same about an item."""
    kinds = {"missing": MissingItemError, "too large": LargeItemError}
    return kinds.get(error.kind, ItemError)(str(error))

"""The names under which rows have items: columns, placeholders, suffixes, and the types of parts of a message."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from omni.registry import load_modalities, modalities

FILES = re.compile(r"(.+_)?file_names?")
"""Columns for files of any modality."""
_PART = re.compile(r"(?:input_)?([a-z0-9_]+?)(?:_url)?")


@dataclass(frozen=True)
class Names:
    """The names under which rows have items of all known modalities.

    Attributes:
        columns: the columns that hold files of one modality, each with it: `images`, `audio`.
        tokens: the placeholders, each with its modality.
        suffixes: the suffixes of files, each with its modality.
    """

    columns: Mapping[str, str]
    tokens: Mapping[str, str]
    suffixes: Mapping[str, str]

    @classmethod
    def known(cls) -> "Names":
        """The names of all modalities, registered or installed."""
        columns, tokens, suffixes = dict[str, str](), dict[str, str](), dict[str, str]()
        for name in modalities():  # also of a broken plug-in, which a message names when a row has an item for it
            columns |= {name: name, f"{name}s": name}
        for modality in load_modalities()[0]:
            columns[modality.argument] = tokens[modality.token] = modality.name
            suffixes = dict.fromkeys(modality.suffixes, modality.name) | suffixes
        return cls(columns, tokens, suffixes)

    @cached_property
    def placeholder(self) -> re.Pattern[str]:
        """Finds the placeholders of all modalities, each with a line break on either side of it."""
        return re.compile(rf"\n?({'|'.join(map(re.escape, self.tokens)) or '(?!)'})\n?")

    def name_items(self, key: str) -> bool:
        """Whether a column names items."""
        return key in self.columns or FILES.fullmatch(key) is not None

    def of_part(self, kind: str) -> str | None:
        """The modality of OpenAI's part of a message: "image_url" and "input_image" -> "image"; None if it is no item."""
        found = _PART.fullmatch(kind)
        return self.columns.get(found[1]) if found else None

    @property
    def remedy(self) -> str:
        """The names for an item in messages."""
        return f"name its file as {' or '.join(f'`{name}`' for name in dict.fromkeys(self.columns.values()))}"

"""The messages of a chat: texts, and items as data URIs, base64 or addresses."""

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from omni.items import modality_of
from omni.modality import Modality

from .fields import Checked, RequestError, wrapped


class Address(Checked):
    """A file: its data URI, or an address on the public internet."""

    harmless = frozenset({"detail", "format"})
    url: str


class Recording(Checked):
    """A sound as base64, and its format, such as "wav"."""

    data: str
    format: Annotated[str, Field(pattern=r"^[a-z0-9.+-]+$", max_length=20)]


class Document(Checked):
    """A file of any kind: its data URI, or an address on the public internet."""

    harmless = frozenset({"detail", "filename"})
    file_data: str | None = None
    file_url: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.file_data is None) == (self.file_url is None):
            raise PydanticCustomError("file", "a file has 'file_data' or 'file_url'; none is kept under an id")
        return self


KINDS = {
    "text": ("text", None),
    "input_text": ("text", None),
    "output_text": ("text", None),
    "image_url": ("image_url", "image/*"),
    "input_image": ("image_url", "image/*"),
    "audio_url": ("audio_url", "audio/*"),
    "input_audio": ("input_audio", "audio/*"),
    "video_url": ("video_url", "video/*"),
    "file": ("file", None),
    "input_file": ("file", None),
}
"""The types of parts, the field that holds each, and the media type that follows from the type."""
Url = Annotated[Address | None, wrapped(lambda text: {"url": text}, "the address of a file")]


class Part(Checked):
    """A piece of a message: text or an item."""

    harmless = frozenset({"annotations", "cache_control", "detail", "logprobs"})
    type: Literal[
        "text",
        "input_text",
        "output_text",
        "image_url",
        "input_image",
        "audio_url",
        "input_audio",
        "video_url",
        "file",
        "input_file",
    ]
    text: str | None = None
    image_url: Url = None
    audio_url: Url = None
    video_url: Url = None
    input_audio: Recording | None = None
    file: Document | None = None
    _fetched: bytes | None = None

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        """Move the fields of a file into `file`: parts of type "input_file" hold them directly."""
        if not isinstance(values, dict) or values.get("type") != "input_file":
            return values
        fields = {"file_data", "file_url", "filename"} & {*values}
        return {
            **{key: values[key] for key in values if key not in fields},
            "file": {key: values[key] for key in fields},
        }

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        needed, _ = KINDS[self.type]
        if {name for name, _ in KINDS.values() if getattr(self, name) is not None} != {needed}:
            words = {"type": self.type, "needed": needed}
            raise PydanticCustomError("part", "a part of type '{type}' has '{needed}' and nothing else", words)
        return self

    @property
    def _address(self) -> str:
        """The data URI or the address of an item; empty if it has neither."""
        if self.file is not None:
            return self.file.file_data or self.file.file_url or ""
        found = self.image_url or self.audio_url or self.video_url
        return found.url if found else ""

    @property
    def remote(self) -> str | None:
        """The address to fetch the item from, if it has one."""
        address = self._address
        return address if re.match(r"https?://", address, re.IGNORECASE) else None

    @property
    def media_types(self) -> list[str]:
        """The media type: the one that the file gives, else that of the part's type."""
        said = re.match(r"data:([\w.+-]+/[\w.+-]+)", self._address[:200], re.IGNORECASE)
        file = f"audio/{self.input_audio.format}" if self.input_audio else said[1] if said else None
        return [each for each in (file, KINDS[self.type][1]) if each]

    def modality(self, among: Iterable[str] | None = None) -> Modality | None:
        """The modality that the media type belongs to, among all or among some."""
        names = None if among is None else list(among)
        return next((found for each in self.media_types if (found := modality_of(each, names))), None)

    @property
    def noun(self) -> str:
        """The noun for it in messages."""
        found = self.modality()
        return found.noun if found else "file"

    def fetched(self, data: bytes) -> None:
        """Keep the bytes that were fetched from `remote`."""
        self._fetched = data

    def data(self) -> bytes:
        """The file of an item.

        Raises:
            RequestError: there is no data URI, or it is damaged.
        """
        if self._fetched is not None:
            return self._fetched
        address = self._address
        head, comma, encoded = address.partition(",")
        if self.input_audio is not None:
            encoded = self.input_audio.data
        elif not comma or not re.fullmatch(r"data:.*;base64", head[:1000].strip(), re.IGNORECASE):
            raise RequestError(
                "expected a data URI such as 'data:image/png;base64,...' or a public http address, found "
                f"{address[:60]!r}; files on the server are not read."
            )
        try:
            in_one = encoded.encode("ascii").translate(None, b" \t\r\n")  # some tools break base64 into lines
            return base64.b64decode(in_one, validate=True)
        except ValueError as error:  # raised for characters that are not ASCII, too
            reason = error if isinstance(error, binascii.Error) else "other characters than ASCII"
            what = "data" if self.input_audio else "data URI"
            raise RequestError(f"its {what} is not valid base64 ({reason}); encode it again.") from error


class Message(Checked):
    """One message of a chat."""

    harmless = frozenset({"annotations", "id", "name", "phase", "status"})
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part],
        Field(max_length=1000, fail_fast=True),
        wrapped(lambda text: [{"type": "text", "text": text}], "text or a list of parts"),
    ]
    type: Literal["message"] = "message"

    @model_validator(mode="after")
    def _items_of_users(self) -> Self:
        if self.role != "user" and (items := [part for part in self.content if part.text is None]):
            raise PydanticCustomError("items", "{noun}s belong to the role 'user'", {"noun": items[0].noun})
        return self


Messages = Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]

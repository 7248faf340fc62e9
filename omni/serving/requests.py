"""The content of a request: every field of the four interfaces with its bounds, and the items.

Unknown fields are refused by name. Fields that do not affect the answer (`harmless`) are dropped. A field for something that
this server cannot do is accepted only with a value that asks for nothing. So nothing is ignored silently, and no client can
make the server use too much memory or time.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from omni.items import modality_of
from omni.modality import Modality

MAX_VALUES = 200_000
"""The largest number of values in all lists and objects of a request. Two bytes of JSON can take sixty bytes of memory."""
MAX_UNITS = 200_000_000
"""The largest number of units (pixels, samples, ...) in all items of a modality, see `Modality.measure`."""


class RequestError(ValueError):
    """A request cannot be answered. The message is one sentence."""

    status = 400


# --- Kinds of fields --------------------------------------------------------------------------------------------------


def _only(*neutral: Any) -> BeforeValidator:
    """A field for something that this server cannot do. Only these values are accepted."""

    def check(value: Any) -> Any:
        if not any(value == each and type(value) is type(each) for each in neutral):
            expected = " or ".join(json.dumps(each) for each in neutral)
            raise PydanticCustomError("only", "this server can follow {expected} alone", {"expected": expected})
        return value

    return BeforeValidator(check)


def _wrapped(wrap: Callable[[str], Any], expected: str) -> BeforeValidator:
    """A field that may be text, which stands for a longer form."""

    def check(value: Any) -> Any:
        if not isinstance(value, str | list | dict):
            raise PydanticCustomError("wrapped", "expected {expected}", {"expected": expected})
        return wrap(value) if isinstance(value, str) else value

    return BeforeValidator(check)


def _few(limit: int, values: Any) -> Any:
    """Refuse an object with too many entries, with one error instead of one for each entry."""
    if isinstance(values, dict) and len(values) > limit:
        raise PydanticCustomError(
            "few", "expected at most {limit} entries, found {found}", {"limit": limit, "found": len(values)}
        )
    return values


Count = Annotated[int, Field(ge=1, le=2**31)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=100)]],
    Field(max_length=16, fail_fast=True),
    _wrapped(lambda text: [text], "text or a list of texts"),
]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(partial(_few, 1000)),
]
Variables = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z]\w*$", max_length=100)],
        bool | int | float | Annotated[str, Field(max_length=1000)],
    ],
    BeforeValidator(partial(_few, 16)),
]


class _Checked(BaseModel):
    """An object in a request. Unknown fields and other types are refused; null counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)
    harmless: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, values: Any) -> Any:
        if not isinstance(_few(100, values), dict):
            return values
        return {key: value for key, value in values.items() if value is not None and key not in cls.harmless}


# --- What a chat consists of ------------------------------------------------------------------------------------------


class Address(_Checked):
    """A file: its data URI, or an address on the public internet."""

    harmless = frozenset({"detail", "format"})
    url: str


class Recording(_Checked):
    """A sound as base64, and its format, such as "wav"."""

    data: str
    format: Annotated[str, Field(pattern=r"^[a-z0-9.+-]+$", max_length=20)]


class Document(_Checked):
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
Url = Annotated[Address | None, _wrapped(lambda text: {"url": text}, "the address of a file")]


class Part(_Checked):
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


class Message(_Checked):
    """One message of a chat."""

    harmless = frozenset({"annotations", "id", "name", "phase", "status"})
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part],
        Field(max_length=1000, fail_fast=True),
        _wrapped(lambda text: [{"type": "text", "text": text}], "text or a list of parts"),
    ]
    type: Literal["message"] = "message"

    @model_validator(mode="after")
    def _items_of_users(self) -> Self:
        if self.role != "user" and (items := [part for part in self.content if part.text is None]):
            raise PydanticCustomError("items", "{noun}s belong to the role 'user'", {"noun": items[0].noun})
        return self


Messages = Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]


# --- The interfaces ---------------------------------------------------------------------------------------------------


class StreamOptions(_Checked):
    """What a stream contains besides the answer."""

    harmless = frozenset({"include_obfuscation"})
    include_usage: bool = False


class TextOptions(_Checked):
    """What a response looks like."""

    format: Annotated[Any, _only({"type": "text"})] = None
    verbosity: Annotated[Any, _only("medium")] = None


class Generation(_Checked):
    """The fields of transformers' `GenerationConfig` that a client may set, as `transformers chat` does."""

    harmless = frozenset({"transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id"})
    do_sample: bool | None = None
    max_new_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0.001, le=2)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    use_cache: Annotated[Any, _only(True)] = None


def _read_json(value: Any) -> Any:
    """JSON as a string inside of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise PydanticCustomError("json", "expected a JSON object ({why})", {"why": str(error)}) from error


class Request(_Checked):
    """What the interfaces have in common."""

    model: Annotated[str, Field(max_length=4096)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    frequency_penalty: Penalty = 0
    presence_penalty: Penalty = 0
    logit_bias: Bias = {}
    stop: Stops = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    generation_config: Annotated[Generation, BeforeValidator(_read_json)] = Generation()

    @property
    def limit(self) -> int | None:
        """The largest number of tokens of the answer; None if the request sets none."""
        return self.generation_config.max_new_tokens

    @property
    def alternatives(self) -> int | None:
        """The number of alternative tokens to report with probabilities for each token; None for no probabilities."""
        return None

    def items(self) -> Iterator[tuple[str, Part]]:
        """The items in their order, each with its place for messages."""
        yield from ()


class Conversation(Request):
    """What the two interfaces for chats have in common."""

    harmless = frozenset(
        {
            *("user", "metadata", "store", "service_tier", "safety_identifier"),
            *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "max_tool_calls"),
        }
    )
    where: ClassVar[str] = "messages"
    messages: Messages
    chat_template_kwargs: Variables = {}
    tools: Any = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _no_tools(self) -> Self:
        if self.tools not in (None, []) and self.tool_choice != "none":
            remedy = "leave 'tools' out, or set 'tool_choice' to 'none'"
            raise PydanticCustomError("tools", "this server calls no tools; {remedy}", {"remedy": remedy})
        return self

    def turns(self) -> list[Message]:
        """The messages, with the instructions before them."""
        return self.messages

    def items(self) -> Iterator[tuple[str, Part]]:
        """The items in their order, each with its place for messages."""
        for number, message in enumerate(self.messages):
            for place, part in enumerate(message.content):
                if part.text is None:
                    yield f"{self.where}[{number}].content[{place}]", part


class Chat(Conversation):
    """The body of `/v1/chat/completions`."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    n: Annotated[Any, _only(1)] = None
    modalities: Annotated[Any, _only(["text"])] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None

    @model_validator(mode="after")
    def _needs_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("logprobs", "'top_logprobs' is for 'logprobs': true; add it")
        return self

    @property
    def limit(self) -> int | None:
        """See `Request`."""
        return self.max_completion_tokens or self.max_tokens or super().limit

    @property
    def alternatives(self) -> int | None:
        """See `Request`."""
        return self.top_logprobs if self.logprobs else None


class Response(Conversation):
    """The body of `/v1/responses`, where the messages are called `input`."""

    where = "input"
    messages: Annotated[
        Messages, _wrapped(lambda text: [{"role": "user", "content": text}], "text or a list of messages")
    ] = Field(alias="input")
    instructions: str = ""
    max_output_tokens: Count | None = None
    include: Annotated[
        list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]], Field(max_length=9)
    ] = []
    text: TextOptions | None = None
    background: Annotated[Any, _only(False)] = None
    truncation: Annotated[Any, _only("disabled")] = None

    def turns(self) -> list[Message]:
        """See `Conversation`."""
        told = (
            [Message(role="system", content=[Part(type="text", text=self.instructions)])] if self.instructions else []
        )
        return [*told, *self.messages]

    @property
    def limit(self) -> int | None:
        """See `Request`."""
        return self.max_output_tokens or super().limit

    @property
    def alternatives(self) -> int | None:
        """See `Request`."""
        return self.top_logprobs if "message.output_text.logprobs" in self.include else None


class Completion(Request):
    """The body of `/v1/completions`."""

    harmless = frozenset({"user"})
    prompt: Annotated[
        list[str], Field(min_length=1, max_length=1), _wrapped(lambda text: [text], "text or a list of one text")
    ]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    n: Annotated[Any, _only(1)] = None
    best_of: Annotated[Any, _only(1)] = None
    echo: Annotated[Any, _only(False)] = None
    suffix: Annotated[Any, _only("")] = None

    @property
    def limit(self) -> int | None:
        """See `Request`."""
        return self.max_tokens or super().limit

    @property
    def alternatives(self) -> int | None:
        """See `Request`."""
        return self.logprobs


class Embeddings(_Checked):
    """The body of `/v1/embeddings`: texts and items, a vector for each."""

    harmless = frozenset({"user"})
    stream: ClassVar[bool] = False
    model: Annotated[str, Field(max_length=4096)] | None = None
    input: Annotated[
        list[Annotated[Part, _wrapped(lambda text: {"type": "text", "text": text}, "text or a part")]],
        Field(min_length=1, max_length=1000, fail_fast=True),
        _wrapped(lambda text: [{"type": "text", "text": text}], "text, or a list of texts and parts"),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[Any, _only()] = None

    def items(self) -> Iterator[tuple[str, Part]]:
        """The parts in their order, each with its place for messages."""
        for number, part in enumerate(self.input):
            yield f"input[{number}]", part


class Loading(_Checked):
    """The body of `/load_model`."""

    model: Annotated[str, Field(max_length=4096)] | None = None


# --- From bytes -------------------------------------------------------------------------------------------------------

Kind = TypeVar("Kind", bound=_Checked)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Parse and check the body of a request.

    Raises:
        RequestError: a field is not as expected; the message names it.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise RequestError(f"Expected a request of at most {MAX_VALUES:,} lists, objects and commas; send fewer.")
    try:
        return kind.model_validate(from_json(body, allow_inf_nan=False))
    except ValidationError as error:
        raise RequestError(_sentence(error)) from None
    except ValueError as error:
        escape = "; write both halves of a character beyond \\uFFFF" if "escape" in str(error) else ""
        raise RequestError(f"Expected a JSON object as the body of the request ({error}){escape}.") from None


def _sentence(error: ValidationError) -> str:
    """A sentence about the first error and its place."""
    found = error.errors(include_url=False, include_context=False)[0]
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in found["loc"]]
    where = "".join(steps).removeprefix(".")
    if found["type"] == "missing":
        return f"Expected {where!r}, found nothing."
    if found["type"] == "extra_forbidden":
        return f"This server does not know {where!r}; leave it out."
    message = "it should be an object" if found["type"] == "model_type" else found["msg"].replace("Input", "it", 1)
    shown = "" if isinstance(found["input"], dict) else f", found {str(found['input'])[:60]!r}"
    return f"In {repr(where) if where else 'the body of the request'}: {message[0].lower()}{message[1:]}{shown}."

"""The four interfaces: every field of a request with its bounds."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError, from_json

from .content import Message, Messages, Part
from .fields import Bias, Checked, Count, Fraction, Penalty, Stops, Variables, only, wrapped


class StreamOptions(Checked):
    """What a stream contains besides the answer."""

    harmless = frozenset({"include_obfuscation"})
    include_usage: bool = False


class TextOptions(Checked):
    """What a response looks like."""

    format: Annotated[Any, only({"type": "text"})] = None
    verbosity: Annotated[Any, only("medium")] = None


class Generation(Checked):
    """The fields of transformers' `GenerationConfig` that a client may set, as `transformers chat` does."""

    harmless = frozenset({"transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id"})
    do_sample: bool | None = None
    max_new_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0.001, le=2)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    use_cache: Annotated[Any, only(True)] = None


def _read_json(value: Any) -> Any:
    """JSON as a string inside of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise PydanticCustomError("json", "expected a JSON object ({why})", {"why": str(error)}) from error


class Request(Checked):
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
    tool_choice: Annotated[Any, only("none", "auto")] = None
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
    n: Annotated[Any, only(1)] = None
    modalities: Annotated[Any, only(["text"])] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None

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
        Messages, wrapped(lambda text: [{"role": "user", "content": text}], "text or a list of messages")
    ] = Field(alias="input")
    instructions: str = ""
    max_output_tokens: Count | None = None
    include: Annotated[
        list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]], Field(max_length=9)
    ] = []
    text: TextOptions | None = None
    background: Annotated[Any, only(False)] = None
    truncation: Annotated[Any, only("disabled")] = None

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
        list[str], Field(min_length=1, max_length=1), wrapped(lambda text: [text], "text or a list of one text")
    ]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    n: Annotated[Any, only(1)] = None
    best_of: Annotated[Any, only(1)] = None
    echo: Annotated[Any, only(False)] = None
    suffix: Annotated[Any, only("")] = None

    @property
    def limit(self) -> int | None:
        """See `Request`."""
        return self.max_tokens or super().limit

    @property
    def alternatives(self) -> int | None:
        """See `Request`."""
        return self.logprobs


class Embeddings(Checked):
    """The body of `/v1/embeddings`: texts and items, a vector for each."""

    harmless = frozenset({"user"})
    stream: ClassVar[bool] = False
    model: Annotated[str, Field(max_length=4096)] | None = None
    input: Annotated[
        list[Annotated[Part, wrapped(lambda text: {"type": "text", "text": text}, "text or a part")]],
        Field(min_length=1, max_length=1000, fail_fast=True),
        wrapped(lambda text: [{"type": "text", "text": text}], "text, or a list of texts and parts"),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[Any, only()] = None

    def items(self) -> Iterator[tuple[str, Part]]:
        """The parts in their order, each with its place for messages."""
        for number, part in enumerate(self.input):
            yield f"input[{number}]", part


class Loading(Checked):
    """The body of `/load_model`."""

    model: Annotated[str, Field(max_length=4096)] | None = None

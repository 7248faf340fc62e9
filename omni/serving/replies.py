"""Answers in the forms that OpenAI's clients expect: one object, or the events of a stream."""

import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from .requests import Chat, Completion, Embeddings, Request, Response
from .writing import End, Event, Piece, Token, Vectors

LEAST = -9999.0
"""Used for the logarithm of 0, because JSON has no infinity."""


class Reply:
    """The answer to one request. Each interface has a subclass."""

    def __init__(self, model: str, request: Any) -> None:
        self.request = request
        self.id = uuid.uuid4().hex
        self.common = {"model": model, "created": int(time.time())}

    async def whole(self, answer: AsyncIterator[Event]) -> dict[str, Any]:
        """The answer as one object."""
        pieces: list[Piece] = []
        async for event in answer:
            if isinstance(event, End):
                end = event
            elif isinstance(event, Piece):
                pieces.append(event)
        text = "".join(piece.text for piece in pieces)
        return self._whole(text, [token for piece in pieces for token in piece.tokens], end)

    async def stream(self, answer: AsyncIterator[Event]) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        for event in self._begin():
            yield _sse(event)
        async for part in answer:
            assert not isinstance(part, Vectors), "vectors are not streamed"
            for event in self._end(part) if isinstance(part, End) else self._piece(part):
                yield _sse(event)
        yield "data: [DONE]\n\n"

    def _whole(self, text: str, tokens: Sequence[Token], end: End) -> dict[str, Any]:
        raise NotImplementedError

    def _begin(self) -> Iterator[dict[str, Any]]:
        yield from ()

    def _piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _end(self, end: End) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


class EmbeddingReply(Reply):
    """The answer to `/v1/embeddings`."""

    async def whole(self, answer: AsyncIterator[Event]) -> dict[str, Any]:
        """The vectors as one object."""
        data: list[dict[str, Any]] = []
        read = 0
        async for event in answer:
            if isinstance(event, Vectors):
                data = [
                    {"object": "embedding", "index": index, "embedding": self._written(vector)}
                    for index, vector in enumerate(event.values)
                ]
            elif isinstance(event, End):
                read = event.tokens_read
        usage = {"prompt_tokens": read, "total_tokens": read}
        return {"object": "list", "data": data, "model": self.common["model"], "usage": usage}

    def _written(self, vector: Any) -> Any:
        if self.request.encoding_format == "float":
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()


class ChatReply(Reply):
    """The answer to `/v1/chat/completions`."""

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.id}", "object": kind, **self.common, "choices": choices}

    def _whole(self, text: str, tokens: Sequence[Token], end: End) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": _reason(end),
        }
        return {**self._object("chat.completion", [choice]), "usage": _usage(end), **_known(end)}

    def _chunk(self, delta: dict[str, Any], tokens: Sequence[Token] = (), reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason}
        return self._object("chat.completion.chunk", [choice])

    def _begin(self) -> Iterator[dict[str, Any]]:
        yield self._chunk({"role": "assistant", "content": ""})

    def _piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        yield self._chunk({"content": piece.text}, piece.tokens)

    def _end(self, end: End) -> Iterator[dict[str, Any]]:
        yield {**self._chunk({}, reason=_reason(end)), **_known(end)}
        if self.request.stream_options.include_usage:
            yield {**self._object("chat.completion.chunk", []), "usage": _usage(end)}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.request.alternatives is None:
            return None
        return {"content": _described(tokens), "refusal": None}


class CompletionReply(Reply):
    """The answer to `/v1/completions`."""

    def __init__(self, model: str, request: Request) -> None:
        super().__init__(model, request)
        self._offset = 0

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": f"cmpl-{self.id}", "object": "text_completion", **self.common, "choices": choices}

    def _choice(self, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        logprobs: dict[str, list[Any]] | None = None
        if self.request.alternatives is not None:
            logprobs = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [_finite(token.logprob) for token in tokens],
                "top_logprobs": [{name: _finite(value) for name, value in token.likely} for token in tokens],
                "text_offset": [],
            }
            for token in tokens:
                logprobs["text_offset"].append(self._offset)
                self._offset += len(token.text)
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _whole(self, text: str, tokens: Sequence[Token], end: End) -> dict[str, Any]:
        return {**self._object([self._choice(text, tokens, _reason(end))]), "usage": _usage(end), **_known(end)}

    def _piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        yield self._object([self._choice(piece.text, piece.tokens, None)])

    def _end(self, end: End) -> Iterator[dict[str, Any]]:
        yield {**self._object([self._choice("", (), _reason(end))]), **_known(end)}
        if self.request.stream_options.include_usage:
            yield {**self._object([]), "usage": _usage(end)}


class ResponseReply(Reply):
    """The answer to `/v1/responses`."""

    def __init__(self, model: str, request: Request) -> None:
        super().__init__(model, request)
        self._number, self._text, self._tokens = 0, "", list[Token]()
        self._place = {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}

    def _object(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        request = self.request
        assert isinstance(request, Response)
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.common["created"],
            "model": self.common["model"],
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions or None,
            "max_output_tokens": request.max_output_tokens,
            "output": output,
            "parallel_tool_calls": False,
            "temperature": request.temperature,
            "tool_choice": request.tool_choice or "auto",
            "tools": [],
            "top_p": request.top_p,
            "usage": usage,
            "metadata": {},
        }

    def _content(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": _described(tokens)}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": f"msg_{self.id}", "type": "message", "role": "assistant", "status": status, "content": content}

    def _whole(self, text: str, tokens: Sequence[Token], end: End) -> dict[str, Any]:
        status = "completed" if end.complete else "incomplete"
        usage = {
            "input_tokens": end.tokens_read,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": end.tokens_written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": end.tokens_read + end.tokens_written,
        }
        whole = self._object(status, [self._message(status, [self._content(text, tokens)])], usage)
        return {**whole, **_known(end)}

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **values}

    def _begin(self) -> Iterator[dict[str, Any]]:
        yield self._event("created", response=self._object("in_progress", []))
        yield self._event("in_progress", response=self._object("in_progress", []))
        yield self._event("output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("content_part.added", **self._place, part=self._content("", ()))

    def _piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        self._text += piece.text
        self._tokens += piece.tokens
        logprobs = _described(piece.tokens)
        yield self._event("output_text.delta", **self._place, delta=piece.text, logprobs=logprobs)

    def _end(self, end: End) -> Iterator[dict[str, Any]]:
        whole = self._whole(self._text, self._tokens, end)
        (message,) = whole["output"]
        (content,) = message["content"]
        said = {"text": self._text, "logprobs": content["logprobs"]}
        yield self._event("output_text.done", **self._place, **said)
        yield self._event("content_part.done", **self._place, part=content)
        yield self._event("output_item.done", output_index=0, item=message)
        yield self._event(whole["status"], response=whole)


REPLIES: dict[type[Request | Embeddings], type[Reply]] = {
    Chat: ChatReply,
    Completion: CompletionReply,
    Response: ResponseReply,
    Embeddings: EmbeddingReply,
}


def _sse(event: dict[str, Any]) -> str:
    kind = f"event: {event['type']}\n" if "type" in event else ""
    return f"{kind}data: {json.dumps(event)}\n\n"


def failure(message: str) -> str:
    """The event of a stream that has failed."""
    return _sse({"error": {"message": message, "type": "server_error", "code": None, "param": None}})


def _reason(end: End) -> str:
    return "stop" if end.complete else "length"


def _known(end: End) -> dict[str, Any]:
    """Confidence and familiarity (`omni.knowing`), in a field that OpenAI's interface does not have."""
    familiar = None if end.familiar is None else end.familiar.model_dump()
    return {"omni": {"confidence": end.confidence, "familiar": familiar}}


def _usage(end: End) -> dict[str, int]:
    return {
        "prompt_tokens": end.tokens_read,
        "completion_tokens": end.tokens_written,
        "total_tokens": end.tokens_read + end.tokens_written,
    }


def _described(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [
        {
            **_one(token.text, token.logprob),
            "top_logprobs": [_one(text, logprob) for text, logprob in token.likely],
        }
        for token in tokens
    ]


def _one(text: str, logprob: float) -> dict[str, Any]:
    whole = "\ufffd" not in text  # otherwise the token is a part of a character, and its bytes are not known
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)

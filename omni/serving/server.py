"""The server of transformers, `transformers serve`, with one fused model and with requests checked before it sees them."""

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from omni.loading.checkpoint import load

from .remote import is_public
from .requests import RequestError, prepare

KEPT = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/load_model", "/health")
"""Of the server's routes those that a fused model has an answer for; /load_model is what `transformers chat` begins with."""

WRONG = (ValueError, TypeError, LookupError, TemplateError)
"""What transformers raises for a request that it cannot follow, such as a role that the chat template has no place for."""


MAX_BODY = 100 * 2**20
"""Bytes of a request at most."""


class ServingError(ValueError):
    """A server that cannot be started; the message is one sentence."""


def serve(
    checkpoint: str | Path,
    host: str = "localhost",
    port: int = 8000,
    device: str = "auto",
    allow_private: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve a checkpoint with OpenAI's interface until the process is interrupted.

    Args:
        checkpoint: folder of a fused model, loaded as `omni ask` loads it.
        host, port: where to listen.
        device: "cpu", "cuda:0" and the like; "auto" takes an accelerator if there is one.
        allow_private: fetch pictures from addresses of this machine and of private networks, too.
        ready: called once, when requests will be answered.

    Raises:
        ServingError: packages that are missing, an address at which nobody can listen, or an unknown device.
        CheckpointError: a checkpoint that cannot answer.
    """
    if not is_serve_available():
        raise ServingError("Serving needs packages that are not installed: pip install 'omni-thinker[serve]'.")
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = str(accelerator or "cpu")
    with ExitStack() as stack:
        listening = [stack.enter_context(each) for each in _listen(host, port)]
        model, processor = load(checkpoint)
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ServingError(f"The model cannot be put on device {device!r} ({error}); try --device cpu.") from error
        ready()
        allowed = (lambda address: True) if allow_private else is_public
        _Server(str(checkpoint), model, processor, allowed, listening)


def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket for each address that a name stands for, as `localhost` is one of IPv4 and one of IPv6."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in {(family, address) for family, *_, address in found}:
            yield socket.create_server(address, family=family)
    except OSError as error:
        raise ServingError(
            f"No server can listen at {host}:{port} ({error}); choose another --port or --host."
        ) from error


class _Server(Serve):
    """`Serve` that is given its model, and starts only when its handlers are guarded."""

    def __init__(
        self, name: str, model: Any, processor: Any, allowed: Callable[[str], bool], listening: list[socket.socket]
    ) -> None:
        self._name, self._model, self._processor, self._allowed = name, model, processor, allowed
        self._listening = listening
        as_text = json.dumps({"sanitize_control_tokens": True})  # "<image>" in a question is text, as for `omni ask`
        super().__init__(log_level="error", chat_template_kwargs=as_text, non_blocking=True)

    def start_server(self) -> None:
        """What the base class does last."""
        from fastapi.exceptions import RequestValidationError
        from starlette.exceptions import HTTPException
        from transformers.cli.serving.model_manager import TimedModel

        manager, app = self._model_manager, self.server.config.app
        keep_within_reach(self._model, self._processor)
        key = manager.process_model_name(self._name)
        manager.force_model, manager.model_timeout = self._name, -1
        manager.loaded_models[key] = TimedModel(self._model, -1, self._processor)
        manager.process_model_name = lambda name: self._only(name, key)
        listed = {"id": self._name, "object": "model", "created": 0, "owned_by": "omni"}
        manager.get_gen_models = lambda: [listed]  # not what lies in a cache
        for handler in (self._chat_handler, self._completion_handler, self._response_handler):
            handler.handle_request = self._guarded(handler.handle_request)
        app.router.routes[:] = [route for route in app.router.routes if route.path in KEPT]
        app.add_middleware(_body_limit())
        app.add_exception_handler(HTTPException, _refused)
        app.add_exception_handler(RequestValidationError, _no_json)
        self.server.run(self._listening)

    def _only(self, name: str, key: str) -> str:
        """The model's key, for its name alone: a client must not make the server load other folders."""
        from fastapi import HTTPException

        if name not in (self._name, key):
            raise HTTPException(400, f"Expected the model {self._name!r}, found {name!r}; this server has no other.")
        return key

    def _guarded(self, handle: Callable[..., Any]) -> Callable[..., Any]:
        """A handler that sees checked requests, and whose complaints about one are the client's."""
        from fastapi import HTTPException

        async def handle_request(body: dict[str, Any], request_id: str) -> Any:
            try:
                await asyncio.to_thread(prepare, body, self._allowed)
                return await handle(body, request_id)
            except WRONG as error:
                if not isinstance(error, RequestError):  # may be a bug of ours as well
                    logging.getLogger("uvicorn.error").warning("Request refused: %s", error, exc_info=True)
                raise HTTPException(400, f"{error}" or type(error).__name__) from error

        return handle_request


def keep_within_reach(model: Any, processor: Any) -> None:
    """Hold prompts and answers to the number of tokens that the Thinker was made for.

    A prompt that leaves no room is a `RequestError`; an answer ends at the last position.
    """
    limit = getattr(model.config.text_config, "max_position_embeddings", None) or sys.maxsize
    apply, generate = processor.apply_chat_template, model.generate

    def room(inputs: Mapping[str, Any]) -> int:
        length = inputs["input_ids"].shape[1]
        if length >= limit:
            raise RequestError(
                f"The prompt and its pictures are {length} tokens, which leaves no room for an answer in the {limit} that "
                "the model takes; send fewer pictures or a shorter text."
            )
        return int(limit - length)

    def apply_chat_template(*args: Any, **kwargs: Any) -> Any:
        inputs = apply(*args, **kwargs)
        room(inputs)  # now: an answer that streams has begun when it is generated
        return inputs

    def generate_within(**kwargs: Any) -> Any:
        config = kwargs["generation_config"]
        config.max_new_tokens = min(config.max_new_tokens or limit, room(kwargs))
        # the server passes the processor, of which words to stop at cannot be made
        return generate(**{**kwargs, "tokenizer": processor.tokenizer})

    processor.apply_chat_template, model.generate = apply_chat_template, generate_within


def _body_limit() -> type:
    """Starlette's limit of requests' bodies; where the header says how long one is, refused with a sentence."""
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware.body_limit import RequestBodyLimitMiddleware

    class BodyLimit(RequestBodyLimitMiddleware):
        def __init__(self, app: Any) -> None:
            super().__init__(app, max_body_size=MAX_BODY)

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            length = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
            if length.isdigit() and int(length) > MAX_BODY:
                while (await receive()).get("more_body"):  # a client that is still sending would not read the answer
                    pass
                found = (
                    f"Expected a request of at most {MAX_BODY:,} bytes, found {int(length):,}; send smaller pictures."
                )
                await _refused(None, HTTPException(413, found))(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)

    return BodyLimit


def _refused(request: Any, error: Any) -> Any:
    """A refusal in the form in which OpenAI's clients look for the sentence."""
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": _described(str(error.detail))}, status_code=error.status_code)


def _no_json(request: Any, error: Any) -> Any:
    """A body that is no JSON object."""
    from fastapi.responses import JSONResponse

    why = "; ".join(str(found.get("msg")) for found in error.errors())
    sentence = f"Expected a JSON object as the body of the request ({why})."
    return JSONResponse({"error": _described(sentence)}, status_code=422)


def _described(sentence: str) -> dict[str, str]:
    return {"message": sentence, "type": "invalid_request_error"}

"""What a request may ask for: chats of text and pictures. Pictures are read here, as `omni ask` reads them.

transformers hands on what a request names: it would open a path on this machine, pass over content that it does not
know, and end in an error of the server where a request is not what it expects. Here all of that is a `RequestError`.
"""

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any

from PIL import Image

from omni.vision.pictures import PictureError, read_picture

from .remote import RemoteError, fetch, is_public

_DATA = re.compile(r"data:[^,;]*(;[^,;]*)*;base64,", re.IGNORECASE)
TEXTS, PICTURES = ("text", "input_text", "output_text"), ("image_url", "input_image")
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "prediction": (),
    "functions": ([],),
    "audio": (),
}
"""What transformers would pass over although it asks for another answer, and the values that do not."""


class RequestError(ValueError):
    """A request that cannot be answered; the message is one sentence."""


def prepare(body: dict[str, Any], allowed: Callable[[str], bool] = is_public) -> None:
    """Check the body of a request, and put the pictures in the place of their addresses.

    Args:
        body: of a chat (`messages`), a response (`input`) or a completion (`prompt`), as OpenAI's interface has it.
        allowed: whether an IP address may be connected to.

    Raises:
        RequestError: what is not as expected, and where.
    """
    for key in LIMITS:
        limit = body.get(key)
        if limit is not None and (type(limit) is not int or limit < 1):
            raise RequestError(f"Expected a whole number from 1 on as {key!r}, found {limit!r}.")
    for key, neutral in UNSUPPORTED.items():
        if body.get(key) is not None and body[key] not in neutral:
            raise RequestError(f"This server cannot follow {key!r}, found {_kind(body[key])}; leave it out.")
    if isinstance(body.get("prompt"), str) or isinstance(body.get("input"), str):
        return
    key = "messages" if "input" not in body else "input"
    turns = [body[key]] if isinstance(body.get(key), dict) else body.get(key)
    if not isinstance(turns, list) or not turns:
        raise RequestError(f"Expected {key!r}, a list of at least one message, found {_kind(body.get(key))}.")
    for number, turn in enumerate(turns):
        where = f"{key}[{number}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise RequestError(f"Expected {where} to be an object with a 'role' and a 'content', found {_kind(turn)}.")
        content = turn.get("content")
        if not isinstance(content, str | list):
            raise RequestError(
                f"Expected the content of {where} to be text or a list of parts, found {_kind(content)}."
            )
        for place, part in enumerate(content if isinstance(content, list) else ()):
            _settle(part, f"{where}.content[{place}]", allowed)


def _settle(part: Any, where: str, allowed: Callable[[str], bool]) -> None:
    """Check one part of a message; a picture's address becomes the picture."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXTS:
        if not isinstance(part.get("text"), str):
            raise RequestError(f"Expected text in {where}, found {_kind(part.get('text'))}.")
    elif kind in PICTURES:
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, dict) else address
        if not isinstance(address, str):
            raise RequestError(f"Expected the address of a picture in {where}, found {_kind(address)}.")
        try:
            part["image_url"] = {"url": open_picture(address, allowed)}
        except (RemoteError, PictureError) as error:
            raise RequestError(f"The picture in {where} cannot be used: {error}") from error
    else:
        raise RequestError(f"Expected {where} to be of type 'text' or 'image_url', found {kind!r}.")


def open_picture(address: str, allowed: Callable[[str], bool] = is_public) -> Image.Image:
    """A picture by its data URI or its address.

    Raises:
        RemoteError: an address that nothing is fetched from, or a data URI that is damaged.
        PictureError: no picture there.
    """
    if found := _DATA.match(address):
        try:
            return read_picture(base64.b64decode(address[found.end() :], validate=True))
        except binascii.Error as error:
            raise RemoteError(f"its data URI is not valid base64 ({error}); encode it again.") from error
    if re.match(r"https?://", address, re.IGNORECASE):
        return read_picture(fetch(address, allowed))
    raise RemoteError(
        f"expected a data URI such as 'data:image/png;base64,...' or a public http address, found {address[:60]!r}; files "
        "on the server are not read."
    )


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"

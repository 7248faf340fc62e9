"""What a request may ask for, what it is refused, and that nothing which is not here is passed over."""

import base64
import io
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from omni.serving.fields import MAX_VALUES, RequestError, parse
from omni.serving.requests import Chat, Completion, Request, Response
from omni.vision.pictures import read_picture
from omni.vision.plugin import count_pixels

SCENE = Path("examples/scene.png")
USER = {"role": "user", "content": "hello"}


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def read(kind: type[Request], body: Any) -> Any:
    return parse(kind, body if isinstance(body, bytes) else json.dumps(body).encode())


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], **fields}


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def picture(address: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


def test_text_stands_for_the_longer_forms() -> None:
    long: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}
    assert read(Chat, chat(stop="x")) == read(Chat, {**long, "stop": ["x"]})
    assert read(Response, {"input": "hello"}) == read(Response, {"input": long["messages"]})
    assert read(Completion, {"prompt": "hello"}) == read(Completion, {"prompt": ["hello"]})
    address = uri(SCENE.read_bytes())
    short = {"type": "input_image", "image_url": address}
    assert read(Chat, content(short)).messages[0].content[0].image_url.url == address


def test_null_counts_as_absent() -> None:
    """Clients write out what they were not given, and send back messages as they came."""
    nothing = dict.fromkeys(
        ("stop", "logit_bias", "tools", "tool_choice", "response_format", "seed", "n", "max_tokens")
    )
    assert read(Chat, chat(**nothing)) == read(Chat, chat())
    came = {
        "role": "assistant",
        "content": "red",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
        "audio": None,
    }
    assert read(Chat, {"messages": [USER, came, USER]}).messages[1].content[0].text == "red"


NEUTRAL: dict[str, Any] = {
    "n": 1,
    "stop": [],
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "functions": [],
    "tools": [],
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "parallel_tool_calls": True,
}


@pytest.mark.parametrize("field", NEUTRAL)
def test_fields_that_ask_for_nothing_are_taken(field: str) -> None:
    assert read(Chat, chat(**{field: NEUTRAL[field]})).messages == read(Chat, chat()).messages


def test_tools_that_shall_not_be_called_may_be_named() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    read(Chat, chat(tools=[tool], tool_choice="none"))
    for choice in ({}, {"tool_choice": "auto"}):
        with pytest.raises(RequestError, match="this server calls no tools; leave 'tools' out"):
            read(Chat, chat(tools=[tool], **choice))
    for wish in ("required", {"type": "function", "function": {"name": "f"}}):
        with pytest.raises(RequestError, match='In \'tool_choice\': this server can follow "none" or "auto" alone'):
            read(Chat, chat(tools=[tool], tool_choice=wish))


WRONG: list[tuple[type[Request], Any, str]] = [
    (Chat, b"{nothing", "Expected a JSON object as the body"),
    (Chat, b"[1]", "In the body of the request: it should be an object, found '.1.'"),
    (Chat, b'{"messages": NaN}', "Expected a JSON object as the body"),
    (Chat, b"[" * 100_000, "recursion limit"),
    (Chat, b"[[]" + b",[]" * MAX_VALUES + b"]", "at most 200,000 lists, objects and commas"),
    (Chat, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "both halves of a character beyond"),
    (Chat, b'{"messages": [{"role": "user", "content": "\\udc00 x"}]}', "both halves of a character beyond"),
    (Chat, {}, "Expected 'messages', found nothing"),
    (Chat, {"messages": []}, "at least 1 item"),
    (Chat, {"messages": [USER] * 1001}, "at most 1000 items"),
    (Chat, {"messages": [{"content": "x"}]}, "Expected 'messages.0..role', found nothing"),
    (Chat, {"messages": [{"role": "user"}]}, "Expected 'messages.0..content', found nothing"),
    (Chat, {"messages": [{**USER, "role": "pope"}]}, "'system', 'developer', 'user' or 'assistant', found 'pope'"),
    (Chat, {"messages": [{**USER, "tool_calls": [1]}]}, "does not know 'messages.0..tool_calls'"),
    (Chat, content("hello"), "In 'messages.0..content.0.': it should be an object"),
    (Chat, content({"type": "text"}), "a part of type 'text' has 'text' and nothing else"),
    (Chat, content({"type": "text", "text": "x", "image_url": "y"}), "has 'text' and nothing else"),
    (Chat, content({"type": "image_url"}), "a part of type 'image_url' has 'image_url' and nothing else"),
    (Chat, content({"type": "image_url", "image_url": 5}), "expected the address of a file, found '5'"),
    (Chat, content({"type": "image", "path": "/etc/passwd"}), "found 'image'"),
    (Chat, {"messages": [{"role": "system", "content": [picture("x")]}]}, "pictures belong to the role 'user'"),
    (Chat, chat(tempurature=1), "This server does not know 'tempurature'; leave it out"),
    (Chat, chat(temperature="hot"), "In 'temperature': it should be a valid number, found 'hot'"),
    (Chat, chat(temperature=2.5), "less than or equal to 2"),
    (Chat, chat(top_p=0), "greater than 0"),
    (Chat, chat(max_tokens=0), "greater than or equal to 1, found '0'"),
    (Chat, chat(max_completion_tokens="5"), "a valid integer, found '5'"),
    (Chat, chat(stop=["x" * 1000]), "In 'stop.0.': string should have at most 100 characters"),
    (Chat, chat(stop=["x"] * 300), "at most 16 items"),
    (Chat, chat(stop=[""]), "at least 1 character"),
    (Chat, chat(stop=5), "expected text or a list of texts, found '5'"),
    (Chat, chat(logit_bias={"red": 1}), "In 'logit_bias.red..key.'"),
    (Chat, chat(logit_bias={"5": 101}), "less than or equal to 100"),
    (Chat, chat(logit_bias={str(i): 1 for i in range(1001)}), "at most 1000 entries, found 1001"),
    (Chat, chat(**{f"field{i}": i for i in range(100)}), "at most 100 entries, found 101"),
    (Chat, chat(n=2), "In 'n': this server can follow 1 alone, found '2'"),
    (
        Chat,
        chat(response_format={"type": "json_object"}),
        "'response_format': this server can follow .*\"text\". alone",
    ),
    (
        Chat,
        chat(response_format={"type": "json_schema", "json_schema": {}}),
        "'response_format': this server can follow",
    ),
    (Chat, chat(top_logprobs=2), "'top_logprobs' is for 'logprobs': true"),
    (Chat, chat(logprobs=True, top_logprobs=21), "less than or equal to 20"),
    (Chat, chat(seed=2**64), "In 'seed'"),
    (Chat, chat(generation_config='{"num_beams": 100000}'), "does not know 'generation_config.num_beams'"),
    (Chat, chat(generation_config='{"bad_words_ids": [[1]]}'), "does not know 'generation_config.bad_words_ids'"),
    (Chat, chat(generation_config="{"), "In 'generation_config': expected a JSON object"),
    (Chat, chat(generation_config="5"), "In 'generation_config': it should be an object"),
    (Chat, chat(chat_template_kwargs={"a": {"b": 1}}), "In 'chat_template_kwargs.a"),
    (Chat, chat(chat_template_kwargs={"a" * 101: 1}), "at most 100 characters"),
    (Completion, {}, "Expected 'prompt', found nothing"),
    (Completion, {"prompt": ["a", "b"]}, "at most 1 item"),
    (Completion, {"prompt": [1, 2]}, "In 'prompt"),
    (Completion, {"prompt": "a", "echo": True}, "In 'echo': this server can follow false alone"),
    (Completion, {"prompt": "a", "suffix": "b"}, "In 'suffix'"),
    (Completion, {"prompt": "a", "logprobs": 6}, "less than or equal to 5"),
    (Completion, {"prompt": "a", "messages": [USER]}, "does not know 'messages'"),
    (Response, {"messages": [USER]}, "Expected 'input', found nothing"),
    (Response, {"input": "a", "previous_response_id": "b"}, "does not know 'previous_response_id'"),
    (Response, {"input": [{"type": "function_call_output", "output": "x"}]}, "Expected 'input.0..role', found nothing"),
    (Response, {"input": "a", "text": {"format": {"type": "json_schema"}}}, "In 'text.format'"),
    (Response, {"input": "a", "background": True}, "In 'background'"),
]


@pytest.mark.parametrize(("kind", "body", "sentence"), WRONG, ids=[sentence[:60] for _, _, sentence in WRONG])
def test_what_is_wrong_is_a_sentence(kind: type[Request], body: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as error:
        read(kind, body)
    assert len(str(error.value)) < 300


def test_every_field_of_text_lists_and_numbers_has_bounds() -> None:
    """What has none decides by itself how much is made of it: texts are bounded where tokens are counted, files with the
    body of the request and where they are measured."""
    free = {"text", "instructions", "tools", "url", "data", "file_data", "file_url"}
    for kind in (Chat, Completion, Response):
        schema = kind.model_json_schema()
        for owner in (schema, *schema["$defs"].values()):
            for name, field in owner["properties"].items():
                for form in (field, *field.get("anyOf", ())):
                    bounds = {"string": "maxLength", "array": "maxItems", "number": "maximum", "integer": "maximum"}
                    needed = bounds.get(form.get("type"))
                    bounded = needed is None or needed in form or "exclusiveMaximum" in form or "enum" in form
                    assert bounded or "const" in form or name in free, f"{kind.__name__}.{name}: {form}"


def test_what_is_wrong_many_times_is_found_at_once() -> None:
    """Not each of a hundred thousand mistakes is described."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = {f"k{i}": [] for i in range(60_000)}
    for body in (chat(**many), chat(logit_bias=many), chat(chat_template_kwargs=many), chat(messages=[{}] * 90_000)):
        with pytest.raises(RequestError):
            read(Chat, body)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 * 2**10  # KiB


def test_a_data_uri_is_read_as_a_file_is() -> None:
    """Also with transparency, which other readers drop; and broken into lines, as `base64` prints it."""
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(buffer, "PNG")
    jpeg = Path("examples/scene.jpg").read_bytes()
    lines = "data:image/jpeg;base64,\n" + base64.encodebytes(jpeg).decode()
    named = uri(jpeg, "image/jpeg;name=a.jpg").replace("data:", "DATA:")
    for address, data in ((uri(buffer.getvalue()), buffer.getvalue()), (lines, jpeg), (named, jpeg)):
        ((where, part),) = read(Chat, content({"type": "text", "text": "what"}, picture(address))).items()
        assert (where, part.remote, part.data()) == ("messages[0].content[1]", None, data)
        found = read_picture(part.data())
        assert count_pixels(data) == found.width * found.height
        assert np.array_equal(np.asarray(found), np.asarray(read_picture(data)))


ADDRESSES = {
    "/etc/passwd": "files on the server are not read",
    str(SCENE): "files on the server are not read",
    "file:" + "///etc/passwd": "files on the server are not read",
    base64.b64encode(SCENE.read_bytes()).decode(): "expected a data URI",
    "data:image/png,AAAA": "expected a data URI",
    "data:" + ";" * 100_000 + ",": "expected a data URI",
    "data:image/png;base64,$$": "not valid base64",
    "data:image/png;base64,AAA": "not valid base64",
    "data:image/png;base64,\u00e9": "not valid base64",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_nothing_else_is_a_picture(address: str) -> None:
    ((_, part),) = read(Chat, content(picture(address))).items()
    assert part.remote is None
    with pytest.raises(RequestError, match=ADDRESSES[address]):
        part.data()


def test_pictures_that_are_elsewhere_are_known() -> None:
    ((_, part),) = read(Chat, content(picture("HTTPS://example.org/a.png"))).items()
    assert part.remote == "HTTPS://example.org/a.png"
    part.fetched(b"bytes")
    assert part.data() == b"bytes"


def test_the_pixels_of_a_file_are_counted_by_its_header() -> None:
    buffer = io.BytesIO()
    Image.new("1", (7070, 7070)).save(buffer, "PNG")
    assert count_pixels(buffer.getvalue()) == 7070 * 7070
    assert count_pixels(buffer.getvalue()[:100]) == 0  # which is not read either
    assert count_pixels(b"hello") == 0


def test_what_is_read_is_counted_though_its_comment_be_damaged() -> None:
    """Else its pixels would pass the bound of a request."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("comment", "hello")
    Image.new("L", (70, 50)).save(buffer, "PNG", pnginfo=info)
    damaged = buffer.getvalue().replace(b"hello", b"jello")
    assert read_picture(damaged).info["note"] == "bad checksum in chunk tEXt"
    assert count_pixels(damaged) == 70 * 50

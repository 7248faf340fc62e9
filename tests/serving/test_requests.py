"""What a request may name, and what it is refused; addresses are judged where the connection is made."""

import base64
import io
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.serving.remote import RemoteError, fetch, is_public
from omni.serving.requests import RequestError, open_picture, prepare
from omni.vision.pictures import read_picture

SCENE = Path("examples/scene.png")
LOCAL = "file:" + "///etc/passwd"
PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:4700::1111"]
PRIVATE = [
    *["127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.1", "192.168.1.1", "100.64.0.1"],
    *["169.254.169.254", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1", "ff02::1"],
    *["::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0:1::1"],
]


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def picture(address: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_of_this_machine_and_its_networks(address: str) -> None:
    assert not is_public(address)


class Site(BaseHTTPRequestHandler):
    """/picture, /none, /endless, and /to?URL redirects there."""

    def do_GET(self) -> None:
        path, _, target = self.path.partition("?")
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        self.send_response(404 if path == "/none" else 200)
        self.end_headers()
        try:
            for _ in range(100 if path == "/endless" else 1):
                self.wfile.write(SCENE.read_bytes())
        except OSError:  # the other side had enough
            pass

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """A web server at 127.0.0.1, which may be reached below; every other address may not."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def this_one(address: str) -> bool:
    return address == "127.0.0.1"


def test_a_picture_is_fetched_where_it_may_be(site: str) -> None:
    assert fetch(f"{site}/picture", this_one) == SCENE.read_bytes()
    assert fetch(f"{site}/to?/picture", this_one) == SCENE.read_bytes()
    assert fetch(f"{site}/to?{site}/to?/picture", this_one) == SCENE.read_bytes()
    assert open_picture(f"{site}/picture", this_one).size == read_picture(SCENE).size


REFUSED = {
    "/picture#": "",  # the rule itself
    "/to?http://127.0.0.2/x": "'127.0.0.2' is this machine or in a private network",
    "/to?http://169.254.169.254/latest/meta-data": "'169.254.169.254' is this machine",
    "/to?http://[::1]/x": "'::1' is this machine",
    f"/to?{LOCAL}": f"Expected an http or https address, found '{LOCAL}'",
    "/to?//10.0.0.1/x": "'10.0.0.1' is this machine",
    "/none": "answers with status 404",
    "/endless": "more than 1,000,000 bytes",
}


@pytest.mark.parametrize("path", REFUSED)
def test_redirects_and_contents_are_judged_one_by_one(site: str, path: str) -> None:
    if path == "/picture#":
        with pytest.raises(RemoteError, match="is this machine"):
            fetch(f"{site}/picture")
        return
    with pytest.raises(RemoteError) as error:
        fetch(site + path, this_one, max_bytes=1_000_000)
    assert REFUSED[path] in str(error.value)


def test_redirects_come_to_an_end(site: str) -> None:
    with pytest.raises(RemoteError, match="more than 5 redirects"):
        fetch(f"{site}/to?" + f"{site}/to?" * 7 + "/picture", this_one)


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f000001", "127.1", "0", "[::ffff:127.0.0.1]"])
def test_other_ways_to_write_this_machine(site: str, host: str) -> None:
    with pytest.raises(RemoteError, match="is this machine or in a private network"):
        fetch(f"http://{host}:{site.rpartition(':')[2]}/picture")


def test_a_name_is_judged_by_all_that_it_stands_for_and_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may have a public address beside a private one, or change what it stands for from one look to the next."""
    looked: list[str] = []

    def look_up(*addresses: str) -> None:
        def answer(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
            looked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", answer)

    connected: list[Any] = []

    def connect(address: Any, *args: Any, **kwargs: Any) -> Any:
        connected.append(address)
        raise OSError("nobody there")

    monkeypatch.setattr(socket, "create_connection", connect)
    look_up("8.8.8.8", "10.0.0.7")
    with pytest.raises(RemoteError, match="'both.example' is this machine or in a private network"):
        fetch("http://both.example/x.png")
    assert connected == []
    look_up("8.8.8.8")
    with pytest.raises(RemoteError, match="cannot be fetched .nobody there"):
        fetch("http://public.example/x.png")
    assert connected == [("8.8.8.8", 80)]
    assert looked == ["both.example", "public.example"]


def test_a_data_uri_is_read_as_a_file_is() -> None:
    """Also with transparency, which other readers drop."""
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(buffer, "PNG")
    for data, kind in ((buffer.getvalue(), "image/png"), (Path("examples/scene.jpg").read_bytes(), "image/jpeg")):
        body = content(picture(uri(data, kind)), {"type": "text", "text": "what"})
        prepare(body)
        found = body["messages"][0]["content"][0]["image_url"]["url"]
        assert np.array_equal(np.asarray(found), np.asarray(read_picture(data)))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a path": (content(picture("/etc/passwd")), "files on the server are not read"),
    "a path that is here": (content(picture(str(SCENE.absolute()))), "files on the server are not read"),
    "a relative path": (content(picture(str(SCENE))), "files on the server are not read"),
    "a file address": (content(picture(LOCAL)), "files on the server are not read"),
    "bare base64": (content(picture(base64.b64encode(SCENE.read_bytes()).decode())), "expected a data URI"),
    "loopback": (content(picture("http://127.0.0.1/x.png")), "is this machine or in a private network"),
    "metadata": (content(picture("http://169.254.169.254/")), "is this machine or in a private network"),
    "damaged base64": (content(picture("data:image/png;base64,$$")), "not valid base64"),
    "no picture": (content(picture(uri(b"hello"))), "not a picture that can be read"),
    "cut off": (
        content(picture(uri(SCENE.read_bytes()[:-500]))),
        "picture in messages\\[0\\].content\\[0\\] cannot be used",
    ),
    "no address": (content({"type": "image_url"}), "Expected the address of a picture in .*, found nothing"),
    "a video": (content({"type": "video_url", "video_url": {"url": "/etc/passwd"}}), "found 'video_url'"),
    "another kind of picture": (content({"type": "image", "path": "/etc/passwd"}), "found 'image'"),
    "no part": (content("hello"), "found None"),
    "no text": (content({"type": "text"}), "Expected text in messages"),
    "nothing": ({}, "Expected 'messages'.* found nothing"),
    "no messages": ({"messages": []}, "at least one message"),
    "no role": ({"messages": [{"content": "x"}]}, "with a 'role'"),
    "no content": ({"messages": [{"role": "user"}]}, "content of messages.0. to be text or a list"),
    "no room": ({**content(), "max_tokens": 0}, "whole number from 1 on as 'max_tokens', found 0"),
    "several answers": ({**content(), "n": 2}, "cannot follow 'n', found int '2'"),
    "JSON": ({**content(), "response_format": {"type": "json_object"}}, "cannot follow 'response_format'"),
    "words for numbers": ({**content(), "max_completion_tokens": "5"}, "found '5'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_a_sentence(name: str) -> None:
    body, message = WRONG[name]
    with pytest.raises(RequestError, match=message):
        prepare(body)


def test_requests_of_the_other_interfaces() -> None:
    prepare({"prompt": "hello", "n": 1, "logprobs": None, "echo": False})
    prepare({"input": "hello"})
    body = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": uri(SCENE.read_bytes())}]}]}
    prepare(body)
    assert isinstance(body["input"][0]["content"][0]["image_url"]["url"], Image.Image)

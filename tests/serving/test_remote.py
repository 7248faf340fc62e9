"""Which addresses a picture may come from; they are judged where the connection is made."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from omni.networks import is_public
from omni.serving import remote
from omni.serving.remote import RemoteError
from tests.conftest import web_servers

SCENE = Path("examples/scene.png")
LOCAL = "file:" + "///etc/passwd"
PUBLIC = ["93.184.216.34", "8.8.8.8", "1.1.1.1", "223.255.255.254", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8"]
SPECIAL = {
    "this machine": ["127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "::1", "::"],
    "private": [
        "10.0.0.1",
        "10.255.255.255",
        "172.16.0.1",
        "172.31.9.9",
        "192.168.1.1",
        "fd00::1",
        "fc00::1",
        "fec0::1",
    ],
    "between a provider and its customers": ["100.64.0.1", "100.127.255.255"],
    "link-local": ["169.254.1.1", "fe80::1", "fe80::1%eth0", "febf::1"],
    "metadata of clouds": [
        *["169.254.169.254", "169.254.170.2", "192.0.0.192", "100.100.100.200", "168.63.129.16"],
        *["fd00:ec2::254", "fd20:ce::254"],
    ],
    "protocols": ["192.0.0.8", "192.0.0.9", "192.0.0.170", "2001:1::1", "2001:20::1", "100::1", "5f00::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "measurements": ["198.18.0.1", "198.19.255.255", "2001:2::1"],
    "whichever is near": ["192.31.196.1", "192.52.193.1", "192.88.99.1", "192.175.48.1", "2620:4f:8000::1"],
    "many at once": ["224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1", "ff02::1", "ff0e::1"],
    "an IPv4 address within": [
        *["::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"],
        *["::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::808:808", "64:ff9b:1::7f00:1"],
        *["2002:7f00:1::", "2002:a00:1::1", "2001:0:1::1", "2001::f5ff:fffe"],
    ],
    "nobody's": ["4000::1", "8000::1", "fe00::1"],
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", [address for addresses in SPECIAL.values() for address in addresses])
def test_all_other_addresses(address: str) -> None:
    assert not is_public(address)


class Site(BaseHTTPRequestHandler):
    """/picture, /none, /endless, and /to?URL redirects there; it counts its visitors."""

    visits = 0

    def do_GET(self) -> None:
        type(self).visits += 1
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


class Secret(Site):
    """What only this machine can reach."""

    visits = 0


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """A web server at 127.0.0.1, which may be reached below, and one at 127.0.0.2 with the same port, which may not."""
    with web_servers(Site, Secret) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def nobody_learns_the_secret() -> Iterator[None]:
    yield
    assert Secret.visits == 0


def this_one(address: str) -> bool:
    return address == "127.0.0.1"


def fetch(*args: Any, **kwargs: Any) -> bytes:
    return asyncio.run(remote.fetch(*args, **kwargs))


def test_a_file_is_fetched_where_it_may_be(site: str) -> None:
    assert fetch(f"{site}/picture", this_one) == SCENE.read_bytes()
    assert fetch(f"{site}/to?/picture", this_one) == SCENE.read_bytes()
    assert fetch(f"{site}/to?{site}/to?/picture", this_one) == SCENE.read_bytes()


REFUSED = {
    "/to?http://127.0.0.2:PORT/picture": "'127.0.0.2' is this machine or in a private network",
    "/to?/to?http://127.0.0.2:PORT/picture": "'127.0.0.2' is this machine",
    "/to?//127.0.0.2:PORT/picture": "'127.0.0.2' is this machine",
    "/to?http://169.254.169.254/latest/meta-data": "'169.254.169.254' is this machine",
    "/to?http://[::1]/x": "'::1' is this machine",
    f"/to?{LOCAL}": f"Expected an http or https address, found '{LOCAL}'",
    "/to?//10.0.0.1/x": "'10.0.0.1' is this machine",
    "/none": "answers with status 404",
    "/endless": "more than 1,000,000 bytes",
}


@pytest.mark.parametrize("path", REFUSED)
def test_redirects_and_contents_are_judged_one_by_one(site: str, path: str) -> None:
    with pytest.raises(RemoteError) as error:
        fetch(site + path.replace("PORT", site.rpartition(":")[2]), this_one, max_bytes=1_000_000)
    assert REFUSED[path] in str(error.value)


def test_redirects_come_to_an_end(site: str) -> None:
    with pytest.raises(RemoteError, match="more than 5 redirects"):
        fetch(f"{site}/to?" + f"{site}/to?" * 7 + "/picture", this_one)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "127.1", "0", "[::ffff:127.0.0.1]"]
)
def test_other_ways_to_write_this_machine(site: str, host: str) -> None:
    visits = Site.visits
    with pytest.raises(RemoteError, match="is this machine or in a private network"):
        fetch(f"http://{host}:{site.rpartition(':')[2]}/picture")
    assert Site.visits == visits


ADDRESSES = [
    *[
        "",
        "http:",
        "http://",
        "http://:80/",
        "http://[::1",
        "http://a:99999/",
        "http://a:0/",
        "http://a b/",
        "ftp://a/b",
    ],
    *["http://xn--/", f"http://{'a' * 70}.com/", "http://" + "a." * 3000, "http://\u2028/", "http://localhost%00/"],
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_is_no_address_is_a_sentence(address: str) -> None:
    with pytest.raises(RemoteError, match="Expected an http|is not known") as error:
        fetch(address)
    assert len(str(error.value)) < 400


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`resolver(*answers)`: names stand for what each answer lists, one answer after another; returns who was asked for."""
    real = socket.getaddrinfo

    def install(*answers: list[str]) -> list[str]:
        asked: list[str] = []

        def look_up(host: Any, port: int, *args: Any, **kwargs: Any) -> list[Any]:
            if not str(host).endswith(".example"):
                return real(host, port, *args, **kwargs)
            asked.append(host)
            addresses = answers[min(len(asked), len(answers)) - 1]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        return asked

    return install


def test_a_name_is_looked_up_once_and_connected_to_as_it_was_judged(site: str, resolver: Any) -> None:
    """The second look would find the secret."""
    asked = resolver(["127.0.0.1"], ["127.0.0.2"])
    assert fetch(f"http://turns.example:{site.rpartition(':')[2]}/picture", this_one) == SCENE.read_bytes()
    assert asked == ["turns.example"]


def test_a_name_that_has_turned_is_judged_again_behind_a_redirect(site: str, resolver: Any) -> None:
    resolver(["127.0.0.1"], ["127.0.0.2"])
    port = site.rpartition(":")[2]
    with pytest.raises(RemoteError, match="'second.example' is this machine or in a private network"):
        fetch(f"http://first.example:{port}/to?http://second.example:{port}/picture", this_one)


def test_a_name_is_judged_by_all_that_it_stands_for(site: str, resolver: Any) -> None:
    visits = Site.visits
    resolver(["127.0.0.1", "127.0.0.2"])
    with pytest.raises(RemoteError, match="'both.example' is this machine or in a private network"):
        fetch(f"http://both.example:{site.rpartition(':')[2]}/picture", this_one)
    assert Site.visits == visits


def test_of_several_addresses_the_next_is_tried(site: str, resolver: Any) -> None:
    resolver(["127.0.0.3", "127.0.0.1"])  # at the first nobody listens
    address = f"http://several.example:{site.rpartition(':')[2]}/picture"
    assert fetch(address, lambda address: address in ("127.0.0.1", "127.0.0.3")) == SCENE.read_bytes()


def test_a_slow_site_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RemoteError, match="takes longer than"):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/", this_one)

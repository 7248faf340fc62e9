"""The documentation as a site: it is built without a warning, is whole, and needs nothing from elsewhere."""

import importlib
import pydoc
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from omni.cli.app import app

PACKAGES = ("omni", "omni.exchange.micro_omni", "omni.embedding", "omni.evaluation")
"""Those that say what is public, in `__all__` or to `dir`."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, python: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = python("-m", "sphinx", "-W", "--keep-going", "-q", "docs", folder)
    assert done.returncode == 0, done.stderr
    return folder


class Parts(HTMLParser):
    """What a browser fetches to show a page, and the anchors of the page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.text = page.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.add(found.get("id") or "")
        if tag == "link" and found.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.fetched.append(found.get("href") or "")
        elif tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and "src" in found:
            self.fetched.append(found["src"] or "")


def test_every_page_is_there_and_listed(site: Path) -> None:
    pages = {path.stem for path in Path("docs").glob("*.md")}
    contents = Parts(site / "index.html").text
    for page in pages:
        assert (site / f"{page}.html").is_file()
        assert page == "index" or f'href="{page}.html"' in contents, page


def test_it_is_shown_without_a_network(site: Path) -> None:
    pages = list(site.glob("*.html"))
    assert len(pages) > 10
    for page in pages:
        parts = Parts(page)
        assert parts.fetched
        for address in parts.fetched:
            assert not re.match(r"(\w+:)?//", address), (page.name, address)
            assert (page.parent / address.split("?")[0]).is_file(), (page.name, address)
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?\s*(https?:)?//", style.read_text("utf-8")), style.name


def test_what_is_public_is_in_the_reference(site: Path) -> None:
    anchors = Parts(site / "api.html").anchors
    documented = [pydoc.locate(anchor) for anchor in anchors if anchor.startswith("omni.")]
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", dir(module)):
            thing = getattr(module, name)
            if not isinstance(thing, (type, FunctionType)):  # a constant, or a name for a type
                continue
            assert f"{package}.{name}" in anchors or any(thing is other for other in documented), f"{package}.{name}"


@pytest.mark.parametrize(
    ("shown", "question"), [("circle.png", "what color is the circle"), ("attention.png", "what is below the heart")]
)
def test_the_maps_that_are_shown_are_those_that_are_drawn(shown: str, question: str, tmp_path: Path) -> None:
    """`omni attend examples/scene.png QUESTION --output docs/SHOWN` makes them."""
    arguments = ["attend", "examples/scene.png", question, "--output", str(tmp_path / shown)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    drawn, kept = (np.asarray(Image.open(path).convert("RGB"), float) for path in (tmp_path / shown, f"docs/{shown}"))
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 1

"""The page in a real Chromium: choose, ask, look, from a desk and from a phone."""

import base64
import json
import os
import re
import shutil
import time
import wave
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.app.visit import WIDTH
from omni.looking.panels import as_seen, overlay
from omni.vision.pictures import read_picture

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser is driven by playwright: pip install playwright"
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")

SCENE, SECOND = "examples/scene.png", "examples/second.png"
QUESTION, LONG = "what is below the heart", "describe the picture"
DESK, PHONE = (1280, 900), (390, 844)
SCREENSHOT = os.environ.get("OMNI_SCREENSHOT")
"""Where `OMNI_SCREENSHOT=docs/app.png pytest tests/app -k looks` writes what the documents show."""


class Visitor:
    """A tab of a browser, and what is done in it."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        page.goto(address)
        page.get_by_role("button", name="Ask").wait_for()

    def upload(self, *paths: Any) -> None:
        self.page.set_input_files("input[type=file]", [str(path) for path in paths])

    def ask(self, question: str) -> None:
        self.page.evaluate("document.querySelector('.answer')?.setAttribute('data-old', '')")
        self.page.get_by_label("Question").fill(question)
        self.page.get_by_role("button", name="Ask").click()

    def answer(self) -> str:
        """As soon as it is whole."""
        self.page.wait_for_selector(".answer:not([data-old], [aria-busy]) .hint")
        return self.page.inner_text(".answer p:first-child")

    def word(self, number: int) -> None:
        pressed = f".answer button[data-word='{number}'][aria-pressed='{{}}']"
        before = "true" if self.page.query_selector(pressed.format("true")) else "false"
        self.page.click(pressed.format(before))
        self.page.wait_for_selector(pressed.format("false" if before == "true" else "true"))

    def pictures(self, count: int = 1) -> list[Any]:
        """As uint8[H, W, 3]."""
        self.page.wait_for_function("count => document.querySelectorAll('.items img').length === count", arg=count)
        sources = [each.get_attribute("src") for each in self.page.query_selector_all(".items img")]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [np.asarray(Image.open(BytesIO(base64.b64decode(source.split(",")[1])))) for source in sources]

    def notices(self) -> list[str]:
        self.page.wait_for_selector("#notice p")
        return [each.inner_text() for each in self.page.query_selector_all("#notice p")]

    def width(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # a sandbox is not to be had by root, as in most containers; the page is ours
        microphone = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # it beeps
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *microphone])
        yield running.new_context()  # one, so that it has the scripts of the page already when it opens it again
        running.close()


@pytest.fixture
def visit(browser: Any, served: Any) -> Iterator[Callable[..., Visitor]]:
    """`visit(size)`: somebody opens the page. Nothing that they do there may be sent elsewhere, or go wrong in a script."""
    addresses, pages, outside, errors = [], [], [], []

    def opened(size: tuple[int, int] = DESK, at: str = served.address) -> Visitor:
        addresses.append(at)
        page = browser.new_page()
        pages.append(page)
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.set_default_timeout(20_000)
        page.on("request", lambda request: outside.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        return Visitor(page, at)

    yield opened
    for page in pages:
        page.close()
    assert errors == []
    own = tuple(f"{address}/" for address in addresses)
    assert [url for url in outside if not url.startswith((*own, "data:", "blob:"))] == []
    assert served.sent == []


def shown(path: str) -> Any:
    return as_seen(None, read_picture(path), WIDTH)


def test_a_visitor_uploads_asks_and_looks(visit: Any, expected: Any, tmp_path: Path) -> None:
    found = expected(QUESTION, SCENE)
    visitor = visit()
    visitor.page.get_by_text("Its weights").click()
    header, config = (
        visitor.page.inner_text("header"),
        json.loads(Path("checkpoints/omni_tiny/config.json").read_text()),
    )
    visitor.page.get_by_text("Its weights").click()
    assert "checkpoints/omni_tiny" in header
    assert "It answers questions about sounds and pictures." in header
    assert "trained from nothing on generated scenes and synthetic voices.\n" in header
    assert "8.4 M parameters" in header
    assert all(f"{part} {mark[:8]}" in header for part, mark in config["fingerprints"].items())
    visitor.upload(SCENE)
    np.testing.assert_array_equal(visitor.pictures()[0], shown(SCENE))
    visitor.ask(QUESTION)
    assert visitor.answer() == found.answer.answer
    for number, weights in enumerate(found.maps[0]):
        visitor.word(number)
        np.testing.assert_array_equal(visitor.pictures()[0], overlay(shown(SCENE), weights))
        caption = visitor.page.inner_text("figcaption")
        assert found.words[number] in caption
        assert f"{weights.sum():.0%}" in caption
    assert visitor.width() == DESK[0]
    target, taken = Path(SCREENSHOT or tmp_path / "app.png"), visitor.page.screenshot(full_page=True)
    Image.open(BytesIO(taken)).save(target, optimize=True)
    assert target.stat().st_size < 300_000
    visitor.word(len(found.words) - 1)
    np.testing.assert_array_equal(visitor.pictures()[0], shown(SCENE))


def test_it_fits_a_phone(visit: Any, expected: Any) -> None:
    visitor = visit(PHONE)
    assert visitor.width() == PHONE[0]
    visitor.page.click("[data-pick='0']")
    visitor.pictures()
    visitor.ask(QUESTION)
    visitor.answer()
    visitor.page.locator(".times").scroll_into_view_if_needed()
    visitor.word(0)
    visitor.page.wait_for_function("() => document.querySelector('.items img').getBoundingClientRect().top >= 0")
    assert visitor.width() == PHONE[0]
    np.testing.assert_array_equal(visitor.pictures()[0], overlay(shown(SCENE), expected(QUESTION, SCENE).maps[0][0]))


def test_the_answer_comes_word_by_word_and_its_time_is_told(visit: Any, expected: Any) -> None:
    visitor = visit()
    visitor.page.click("[data-pick='0']")
    visitor.pictures()
    visitor.page.evaluate(
        """() => {
            window.said = [];  // whatever is shown, also if a busy machine shows several at once
            const {get, set} = Object.getOwnPropertyDescriptor(Element.prototype, 'innerHTML');
            Object.defineProperty(document.getElementById('answer'), 'innerHTML', {get, set(html) {
                set.call(this, html);
                said.push(document.querySelector('.answer p:first-child')?.innerText.trim() ?? '');
            }});
        }"""
    )
    visitor.ask(LONG)
    answer = visitor.answer()
    assert answer == expected(LONG, SCENE).answer.answer
    said = list(dict.fromkeys(filter(None, visitor.page.evaluate("said"))))
    assert len(said) > 3
    assert said[-1] == answer
    assert all(later.startswith(earlier) for earlier, later in pairwise(said))

    def times() -> list[float]:
        return [
            float(each.inner_text().split()[0].replace(",", ""))
            for each in visitor.page.query_selector_all(".times li b")
        ]

    first = times()
    assert len(first) == 5
    assert min(first) > 0
    visitor.ask(QUESTION)
    assert visitor.answer() == "cyan moon"
    second = times()
    assert (second[0], second[2]) == (0, 0)  # the picture is neither decoded nor encoded again


@pytest.mark.new_chats
def test_several_pictures_and_none_of_their_names_is_code(visit: Any, expected: Any, tmp_path: Path) -> None:
    visitor, code = visit(), tmp_path / "<img src=x onerror=document.title=1>.png"
    shutil.copy(SCENE, code)
    visitor.upload(code)
    visitor.pictures(1)
    visitor.ask("<img src=x onerror=document.title=2> <image> how many objects are there")
    visitor.answer()
    assert len(visitor.pictures(1)) == 1
    assert visitor.page.title() == "omni"
    visitor.upload(SECOND)  # in the place of the first
    visitor.page.wait_for_selector("figcaption:has-text('second.png')")
    visitor.page.get_by_label("Several").check()
    visitor.upload(SCENE)
    visitor.pictures(2)
    question = "is there a heart in the first picture"
    visitor.ask(question)
    found = expected(question, SECOND, SCENE)
    assert visitor.answer() == found.answer.answer
    visitor.word(0)
    for picture, path, maps in zip(visitor.pictures(2), [SECOND, SCENE], found.maps, strict=True):
        np.testing.assert_array_equal(picture, overlay(shown(path), maps[0]))
    visitor.page.click("[data-remove='0']")
    np.testing.assert_array_equal(visitor.pictures(1)[0], shown(SCENE))
    assert visitor.page.query_selector(".answer") is None  # it was about others


def test_what_is_wrong_is_said_and_the_page_lives_on(visit: Any, damaged: Any) -> None:
    visitor = visit(PHONE)
    visitor.ask(QUESTION)
    assert visitor.notices() == ["There is no sound or picture yet; choose one, and ask again."]
    visitor.upload(*damaged)
    visitor.page.wait_for_selector(f"#notice p:nth-child({len(damaged)})")
    assert visitor.notices() == list(damaged.values())
    assert visitor.width() == PHONE[0]
    visitor.upload(SCENE)
    visitor.pictures()
    visitor.ask("  ")
    visitor.page.wait_for_selector("text=The question is empty")
    assert visitor.notices() == ["The question is empty; ask something."]
    visitor.ask("what color is the circle")
    assert visitor.answer() == "red"
    assert visitor.page.query_selector("#notice p") is None


def test_a_drawing_is_a_picture(visit: Any) -> None:
    visitor = visit(PHONE)
    page = visitor.page
    page.get_by_text("Draw a picture").click()
    page.get_by_role("button", name="Use the drawing").click()
    assert visitor.notices() == ["There is no drawing yet; draw something, and use it then."]
    canvas = page.locator("canvas").bounding_box()
    middle = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
    page.mouse.move(middle[0] - 40, middle[1])
    page.mouse.down()
    page.mouse.move(middle[0] + 40, middle[1], steps=8)
    page.mouse.up()
    page.get_by_role("button", name="Use the drawing").click()
    drawn = visitor.pictures()[0].reshape(-1, 3)
    assert (drawn == 255).all(1).mean() > 0.5  # paper
    assert 0.005 < (drawn == (0xE6, 0x19, 0x4B)).all(1).mean() < 0.5
    assert visitor.width() == PHONE[0]


def test_visitors_do_not_mix(visit: Any, expected: Any) -> None:
    visitors = {SCENE: visit(), SECOND: visit(PHONE)}
    for path, visitor in visitors.items():
        visitor.upload(path)
    for path, visitor in visitors.items():
        visitor.page.bring_to_front()  # a tab behind another sleeps
        np.testing.assert_array_equal(visitor.pictures()[0], shown(path))
        visitor.ask(QUESTION)  # while the other is being answered
    for path, visitor in visitors.items():
        found = expected(QUESTION, path)
        visitor.page.bring_to_front()
        assert visitor.answer() == found.answer.answer
        visitor.word(1)
        np.testing.assert_array_equal(visitor.pictures()[0], overlay(shown(path), found.maps[0][1]))


def test_what_a_visitor_chose_is_forgotten_when_they_leave(visit: Any, served: Any) -> None:
    visitor, tokens = visit(), set()
    visitor.page.on("request", lambda request: tokens.add(request.headers.get("visit")))
    visitor.upload(SCENE)
    visitor.pictures()
    (token,) = tokens
    assert served.send("/remove/9", Visit=token)[0] == 200
    visitor.page.goto("about:blank")
    until = time.monotonic() + 20
    while served.send("/remove/9", Visit=token)[0] == 200 and time.monotonic() < until:
        time.sleep(0.05)
    assert served.send("/remove/9", Visit=token)[0] == 410


@pytest.mark.new_chats
def test_a_recording_is_a_sound(visit: Any, sounds: Any) -> None:
    visitor, tokens = visit(PHONE, sounds.address), set()
    page = visitor.page
    page.on("request", lambda request: tokens.add(request.headers["visit"]) if "visit" in request.headers else None)
    page.get_by_role("button", name="Record with the microphone").click()
    page.get_by_role("button", name=re.compile(r"^Stop, .* \([1-9]\d? of 30 s\)$")).click()
    player = page.locator("audio[src]")
    player.wait_for()
    status, headers, file = sounds.fetch(f"/items/{player.get_attribute('data-play')}", Visit=tokens.pop())
    assert (status, headers["Content-Type"]) == (200, "audio/wav")
    with wave.open(BytesIO(file)) as recorded:
        rate, frames = recorded.getframerate(), recorded.getnframes()
        assert (recorded.getnchannels(), recorded.getsampwidth()) == (1, 2)
        assert len(file) == 44 + 2 * frames
        samples = np.frombuffer(recorded.readframes(frames), "<i2")
    assert rate <= frames < 20 * rate
    assert np.abs(samples).max() > 1000
    page.wait_for_function("document.querySelector('audio').readyState > 2")
    assert page.evaluate("document.querySelector('audio').duration") == pytest.approx(frames / rate, abs=0.01)
    page.evaluate("document.querySelector('audio').currentTime = 0.5")
    assert page.evaluate("document.querySelector('audio').currentTime") == 0.5
    assert page.get_by_role("button", name="Record with the microphone").is_visible()
    visitor.ask("")  # as it was trained
    visitor.answer()
    visitor.ask("how many")
    page.wait_for_selector("#turns li:has-text('what is that')")
    assert visitor.width() == PHONE[0]


def test_without_a_microphone_the_page_says_so(visit: Any, sounds: Any) -> None:
    visitor = visit(PHONE, sounds.address)
    visitor.page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', 'NotFoundError')); }"
    )
    visitor.page.get_by_role("button", name="Record with the microphone").click()
    assert visitor.notices()[0].startswith("The browser gives no microphone (NotFoundError)")
    assert visitor.page.get_by_role("button", name="Record with the microphone").is_visible()


def test_a_keyboard_is_enough(visit: Any, expected: Any) -> None:
    visitor = visit()
    page, found = visitor.page, expected(QUESTION, SCENE)

    def reach(role: str, name: str) -> None:
        control = page.get_by_role(role, name=name, exact=True)
        for _ in range(30):
            page.keyboard.press("Tab")
            if control.evaluate("each => each === document.activeElement"):
                break
        else:
            pytest.fail(f"no Tab leads to {name}")
        assert control.evaluate("each => getComputedStyle(each).outlineStyle") == "solid"

    reach("button", QUESTION)
    page.keyboard.press("Enter")
    visitor.pictures()
    reach("textbox", "Question")
    page.keyboard.press("Enter")
    visitor.answer()
    reach("button", "moon")
    for pressed in ("true", "false"):  # the focus stays
        page.keyboard.press("Enter")
        page.wait_for_selector(f"[data-word='1'][aria-pressed={pressed}]")
        assert page.evaluate("document.activeElement.textContent") == found.words[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(visit: Any, sounds: Any, tone: bytes, tmp_path: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    (tmp_path / "tone.wav").write_bytes(tone)

    def violations(visitor: Visitor, *sizes: tuple[int, int]) -> None:
        for width, height in sizes:
            visitor.page.set_viewport_size({"width": width, "height": height})
            found = axe.run(visitor.page, options={"rules": {"target-size": {"enabled": True}}})
            assert found.violations_count == 0, found.generate_report()

    visitor = visit()
    visitor.page.emulate_media(color_scheme=scheme)
    violations(visitor, DESK)
    visitor.page.get_by_text("Its weights").click()
    visitor.page.get_by_text("Draw a picture").click()
    visitor.page.click("[data-pick='0']")
    visitor.pictures()
    for question in (LONG, QUESTION):
        visitor.ask(question)
        visitor.answer()
    visitor.word(1)
    visitor.upload(__file__)
    visitor.notices()
    violations(visitor, PHONE, DESK)
    hearing = visit(DESK, sounds.address)
    hearing.page.emulate_media(color_scheme=scheme)
    hearing.page.get_by_label("Several").check()
    hearing.upload(tmp_path / "tone.wav", SCENE)
    hearing.pictures(2)
    violations(hearing, DESK, PHONE)

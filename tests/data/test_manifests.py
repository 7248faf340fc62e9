"""Data sets of every layout as rows, and one sentence about each that is none. The files are real."""

import csv
import io
import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omni.data.conversations import ask
from omni.data.manifests import Manifest, ManifestConversations
from omni.data.sources import ManifestError
from omni.vision.pictures import MAX_PIXELS, PictureError

PROMPT = "Describe the picture."
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in tests are short ones, within a folder that holds a.png, b.png, ..., each of one colour."""
    monkeypatch.chdir(tmp_path)
    for name, colour in zip("abcdefgh", COLOURS, strict=True):
        paint(f"{name}.png", colour)


def paint(path: str | Path, colour: str = "red") -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), colour).save(path)
    return Path(path)


def write(name: str, text: str | bytes) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(name: str, *rows: Any) -> Path:
    return write(name, "".join(json.dumps(row) + "\n" for row in rows))


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        Manifest.read(*arguments, **options)
    return sentence(str(caught.value))


def sentence(message: str) -> str:
    assert re.fullmatch(r"[^\n]+[^.\n]\.", message), message
    assert re.search(r"; [^;]+\.$", message), f"what to do is missing: {message}"
    return message


def contents(manifest: Manifest) -> list[tuple[list[str], Any, str | None]]:
    return [([str(file.path) for file in row.files], row.conversation, row.kind) for row in manifest]


IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def chat(*contents: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# --- Folders with metadata --------------------------------------------------------------------------------------------


def test_a_folder_with_metadata_in_json_lines() -> None:
    for name in ("wren.png", "sub/two birds.png", "left.png", "right.png"):
        paint(f"birds/{name}")
    lines(
        "birds/metadata.jsonl",
        {"file_name": "wren.png", "text": "a wren", "id": 7},
        {"file_name": "sub/two birds.png", "question": "how many?", "answer": "two", "kind": "count"},
        {"file_names": ["left.png", "right.png"], "question": "the same?", "answer": "no"},
        {"left_file_name": "left.png", "right_file_name": "right.png", "caption": "two sides"},
        {"file_name": "wren.png", "messages": chat([IMAGE, text("what?")], [text("a wren")])},
    )
    manifest = Manifest.read("birds")
    first = manifest[0]
    assert first.source == "birds/metadata.jsonl, line 1"
    assert [file[:2] for file in first.files] == [("image", Path("birds/wren.png"))]
    assert first.conversation == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a wren"}]},
    ]
    assert first.kind is None
    assert contents(manifest)[1:] == [
        (["birds/sub/two birds.png"], chat([IMAGE, text("how many?")], [text("two")]), "count"),
        (["birds/left.png", "birds/right.png"], chat([IMAGE, IMAGE, text("the same?")], [text("no")]), None),
        (["birds/left.png", "birds/right.png"], chat([IMAGE, IMAGE, text(PROMPT)], [text("two sides")]), None),
        (["birds/wren.png"], chat([IMAGE, text("what?")], [text("a wren")]), None),
    ]


def test_a_folder_with_metadata_in_a_table() -> None:
    paint("birds/wren.png")
    paint("birds/a, b.png")
    write(
        "birds/metadata.csv",
        "file_name,question,answer,kind,note\r\n"
        "wren.png,what is it?,a wren,name,\r\n"
        '"a, b.png","how\nmany, and ""which""?",two,,first\r\n'
        "\r\n"
        "wren.png,what?,ein Zaunkönig,name,\r\n",
    )
    manifest = Manifest.read("birds", prompt="unused")
    assert contents(manifest) == [
        (["birds/wren.png"], ask("what is it?", "a wren"), "name"),
        (["birds/a, b.png"], ask('how\nmany, and "which"?', "two"), None),
        (["birds/wren.png"], ask("what?", "ein Zaunkönig"), "name"),
    ]
    assert [row.source.rpartition(" ")[2] for row in manifest] == ["2", "3", "6"]


def test_every_row_of_such_a_folder_has_a_picture() -> None:
    lines("metadata.jsonl", {"messages": chat([text("hi")], [text("hello")])}, {"file_name": "a.png", "text": "red"})
    with pytest.raises(ManifestError, match=r"metadata.jsonl, line 1: expected an item beside `messages`") as caught:
        Manifest.read(".")[0]
    assert caught.value.kind == "no picture"


def test_parts_of_a_data_set_are_named_by_the_user() -> None:
    for part in ("train", "test"):
        paint(f"birds/{part}/a.png")
        lines(f"birds/{part}/metadata.jsonl", {"file_name": "a.png", "text": "red"})
    assert "holds the parts of a data set, 'test', 'train'; name one" in refusal("birds")
    assert len(Manifest.read("birds/train")) == 1


def test_two_metadata_files_are_one_too_many() -> None:
    lines("metadata.jsonl", {"file_name": "a.png", "text": "red"})
    write("metadata.csv", "file_name,text\na.png,red\n")
    assert "expected one of them" in refusal(".")


# --- Folders of classes -----------------------------------------------------------------------------------------------


def test_a_folder_of_classes() -> None:
    for name in ("wren/10.png", "wren/2.png", "wren/02.png", "blue_tit/1.JPG", "Crow/b.png", "wren/a.webp"):
        paint(f"birds/{name}")
    write("birds/README.md", "about")
    write("birds/.git/x", "")
    write("birds/wren/.DS_Store", "")
    write("birds/wren/Thumbs.db", "")
    manifest = Manifest.read("birds", prompt="What bird is it?")
    assert [str(row.files[0].path.relative_to("birds")) for row in manifest] == [
        "Crow/b.png",
        "blue_tit/1.JPG",
        "wren/02.png",
        "wren/2.png",
        "wren/10.png",
        "wren/a.webp",
    ]
    assert manifest[1].conversation == ask("What bird is it?", "blue_tit")
    assert manifest[1].source == "birds/blue_tit/1.JPG"
    assert {row.kind for row in manifest} == {None}


def test_the_order_of_files_does_not_depend_on_when_they_were_made() -> None:
    names = [
        f"{folder}/{a}{i}{b}.png" for folder in ("x", "x-1", "X") for i in range(12) for a in "_a" for b in ("", "z")
    ]
    found = []
    for seed in (0, 1):
        random.Random(seed).shuffle(names)
        for name in names:
            write(f"{seed}/{name}", "")
        found.append([str(row.files[0].path)[2:] for row in Manifest.read(str(seed))])
    assert found[0] == found[1]
    assert sorted(found[0]) == sorted(names)


def test_a_file_in_a_class_is_never_passed_over() -> None:
    for name in ("wren/1.png", "crow/1.png"):
        paint(f"birds/{name}")
    write("birds/crow/photo.heic", b"....ftypheic")
    data = ManifestConversations(Manifest.read("birds"))
    assert len(data) == 3
    with pytest.raises(PictureError, match=r"^birds/crow/photo.heic: 'birds/crow/photo.heic' is not .* a HEIC picture"):
        data[1]


def test_folders_that_are_no_classes() -> None:
    for name in ("parts/train/a.png", "parts/test/a.png", "one/images/a.png", "deep/x/cat/1.png", "deep/y/cat/1.png"):
        paint(name)
    for name in (
        "flat/a.png",
        "loose/cat/a.png",
        "loose/dog/a.png",
        "loose/b.png",
        "described/images/a.png",
        "described/x/a",
    ):
        paint(name if "." in name else name + ".png")
    lines("described/train.jsonl", {"image": "images/a.png", "text": "red"})
    Path("nothing").mkdir()
    Path("hollow/a").mkdir(parents=True)
    Path("hollow/b").mkdir()
    assert "'test', 'train'; name one of these folders" in refusal("parts")
    assert "each of several classes, found 'images'" in refusal("one")
    assert "'x', 'y'; name one of these folders" in refusal("deep")
    assert "found 'a.png'; write metadata.jsonl" in refusal("flat")
    assert "found 'b.png', 'cat', 'dog'; write" in refusal("loose")
    assert "holds 'train.jsonl', expected metadata.jsonl or metadata.csv, or only folders" in refusal("described")
    assert "found nothing" in refusal("nothing")
    assert "has 0 rows" in refusal("hollow")


# --- Files ------------------------------------------------------------------------------------------------------------

TWO = chat([text("Compare"), IMAGE, text("and"), IMAGE, text(".")], [text("Red, green.")])
SAME = {
    "blocks with paths": {
        "messages": chat(
            [text("Compare"), {**IMAGE, "path": "a.png"}, text("and"), {**IMAGE, "image": "b.png"}, text(".")],
            [text("Red, green.")],
        )
    },
    "bare blocks": {"images": ["a.png", "b.png"], "messages": TWO},
    "placeholders": {
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "user", "content": "Compare\n<image>\nand<image>\n."},
            {"role": "assistant", "content": "Red, green."},
        ],
    },
    "placeholders in blocks": {
        "images": ["a.png", "b.png"],
        "messages": chat([text("Compare<image>and"), IMAGE, text(".")], [text("Red, green.")]),
    },
    "LLaVA": {
        "id": "000",
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "Compare<image>\nand\n<image>."},
            {"from": "gpt", "value": "Red, green."},
        ],
    },
    "a question with placeholders": {
        "image": ["a.png", "b.png"],
        "question": "Compare<image>and<image>.",
        "answer": "Red, green.",
    },
    "a table of Arrow": {
        "images": ["a.png", "b.png"],
        "caption": None,
        "messages": chat(
            [{**text("Compare"), "path": None}, {**IMAGE, "text": None, "path": None}, text("and"), IMAGE, text(".")],
            [{**text("Red, green."), "image": None}],
        ),
    },
    "mixed": {
        "image": "b.png",
        "messages": chat(
            [text("Compare"), {**IMAGE, "path": None, "image": "a.png"}, text("and<image>.")], [text("Red, green.")]
        ),
    },
}


@pytest.mark.parametrize("way", SAME)
def test_ways_to_write_the_same_chat(way: str) -> None:
    row = Manifest.read(lines("rows.jsonl", SAME[way]))[0]
    assert [file[:2] for file in row.files] == [("image", Path("a.png")), ("image", Path("b.png"))]
    assert row.conversation == TWO


def test_a_row_with_one_question() -> None:
    expected = (["a.png"], ask("what color?", "red"), "color")
    rows = [{key: "a.png", "question": "what color?", "answer": "red", "kind": "color"} for key in ("image", "images")]
    assert contents(Manifest.read(lines("rows.jsonl", *rows))) == [expected, expected]
    rows = [{"image": "a.png", key: "red"} for key in ("caption", "text")]
    assert contents(Manifest.read(lines("rows.jsonl", *rows), prompt="P")) == [(["a.png"], ask("P", "red"), None)] * 2


def test_chats_of_several_turns_and_without_pictures() -> None:
    turns = chat([text("hi")], [text("hello")], [text("who are you?")], [text("omni")])
    flat = [{"role": turn["role"], "content": turn["content"][0]["text"]} for turn in turns]
    rows = [{"messages": turns}, {"messages": flat, "images": []}, {"conversations": flat, "image": None}]
    manifest = Manifest.read(lines("rows.jsonl", *rows))
    assert contents(manifest) == [([], turns, None)] * 3
    assert ManifestConversations(manifest)[0].items == {}


CAPTIONS = [{"image": "a.png", "caption": "red"}, {"image": "b.png", "caption": "grün ✓ \U0001f7e9"}]
EXPECTED = [(["a.png"], ask(PROMPT, "red"), None), (["b.png"], ask(PROMPT, CAPTIONS[1]["caption"]), None)]
JSON = {
    "list": json.dumps(CAPTIONS),
    "list, indented": json.dumps(CAPTIONS, indent=2, ensure_ascii=False),
    "list, spread": "\n \r\n"
    + json.dumps(CAPTIONS, indent=None, ensure_ascii=False, separators=("\n,\t", " : "))
    + "\n\n",
    "list after a byte order mark": "\ufeff" + json.dumps(CAPTIONS, ensure_ascii=False),
    "lines": "\n".join(map(json.dumps, CAPTIONS)),
    "lines of Windows": "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in CAPTIONS),
    "lines with blank ones": "\n\n" + " \n\n".join(json.dumps(row) for row in CAPTIONS) + "\n \n",
}


@pytest.mark.parametrize("form", JSON)
def test_json_of_any_form(form: str) -> None:
    assert contents(Manifest.read(write("captions.json", JSON[form]))) == EXPECTED
    if form.startswith("lines"):
        assert contents(Manifest.read(write("captions.jsonl", JSON[form]))) == EXPECTED


def test_the_place_of_a_row_is_where_it_stands() -> None:
    manifest = Manifest.read(write("rows.jsonl", JSON["lines with blank ones"]))
    assert [row.source for row in manifest] == ["rows.jsonl, line 3", "rows.jsonl, line 5"]
    manifest = Manifest.read(write("rows.json", JSON["list"]))
    assert [row.source for row in manifest] == ["rows.json, entry 1", "rows.json, entry 2"]


def test_a_list_of_micro_omni() -> None:
    """Its configuration names the list and `image_root` apart; by default the list lies in that folder."""
    paint("data/images/000001.png")
    captions = [{"image": "000001.png", "caption": "a cat on a mat"}]
    write("data/images/annotations.json", json.dumps(captions))
    write("elsewhere.json", json.dumps(captions))
    beside, apart = Manifest.read("data/images/annotations.json"), Manifest.read("elsewhere.json", root="data/images")
    assert contents(beside) == contents(apart)
    assert beside[0].of("image") == [Path("data/images/000001.png")]


def test_absolute_paths_stay(tmp_path: Path) -> None:
    Path("empty").mkdir()
    manifest = Manifest.read(lines("rows.jsonl", {"image": str(tmp_path / "a.png"), "text": "red"}), root="empty")
    assert manifest[0].of("image") == [tmp_path / "a.png"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("form", ["jsonl", "json", "indented", "csv"])
def test_what_was_written_is_read(form: str, seed: int) -> None:
    """Any text survives the index of bytes: several bytes a character, quotes, commas, line breaks, brackets."""
    draw = random.Random(seed)
    letters = "ab ,;\"\\'[]{}:\n\r\té\u2028漢\U0001f600\x0b\xa0"

    def words() -> str:
        return draw.choice("xé漢") + "".join(draw.choices(letters, k=draw.randrange(12))) + "."

    rows = [{"image": draw.choice(["a.png", "b.png"]), "question": words(), "answer": words()} for _ in range(20)]
    if form == "csv":
        table = io.StringIO(newline="")
        writer = csv.DictWriter(
            table, ["image", "question", "answer"], lineterminator="\r\n", quoting=draw.choice([0, 1])
        )
        writer.writeheader()
        writer.writerows(rows)
        path = write("rows.csv", table.getvalue())
    elif form == "jsonl":
        path = write("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows))
    else:
        path = write("rows.json", json.dumps(rows, ensure_ascii=False, indent=1 if form == "indented" else None))
    manifest = Manifest.read(path)
    assert contents(manifest) == [([row["image"]], ask(row["question"], row["answer"]), None) for row in rows]


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def test_paths_that_are_no_data_set(tmp_path: Path) -> None:
    assert f"'nowhere' does not exist in {str(tmp_path)!r}, expected a folder of files or" in refusal("nowhere")
    assert "'a.png' is of an unknown kind, expected a folder of files or a .jsonl" in refusal("a.png")
    assert "is no folder" in refusal(lines("rows.jsonl", {"image": "a.png", "text": "red"}), root="nowhere")
    paint("classes/x/1.png")
    paint("classes/y/1.png")
    assert "leave out the root" in refusal("classes", root=".")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[ ]"), ("a.json", " "), ("a.csv", "image,text\n")],
)
def test_no_rows_at_all(name: str, content: str) -> None:
    assert f"{name!r} has 0 rows" in refusal(write(name, content))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"image": "a.png", "text": "red"},\n{"image": "b.png" "text": "green"}]', "line 2: .* column 19"),
        ('[{"image": "a.png", "text": "red"},\n{"image": "b.png", "text": "green"}', "line 2: .* column 36"),
        ('[{"image": "a.png", "text": "red"}\n{"image": "b.png", "text": "green"}]', "line 2: .* column 1"),
        ('[{"image": "a.png", "text": "red"}]\n]', "line 2: .* column 1"),
        ("[", "line 1: .* column 2"),
    ],
)
def test_a_list_that_is_no_json(text: str, place: str) -> None:
    assert re.search(rf"^rows.json, {place}", refusal(write("rows.json", text)))


def test_a_wrong_root_is_told_from_a_missing_file() -> None:
    Path("pictures").mkdir()
    path = lines("rows.jsonl", *({"image": f"{name}.png", "text": "x"} for name in "abc"))
    message = refusal(path, root="pictures")
    assert (
        "rows.jsonl, line 1: the picture 'pictures/a.png' does not exist, nor does any other of the first 3 rows"
        in message
    )
    assert "start at the folder 'pictures'" in message
    Path("a.png").unlink()
    assert len(Manifest.read(path)) == 3


GOOD = {"image": "a.png", "text": "red"}


def test_a_bad_row_among_good_ones_is_raised_when_asked_for() -> None:
    rows = [json.dumps(GOOD), '{"image": "a.png"', json.dumps(GOOD)]
    manifest = Manifest.read(write("rows.jsonl", "\n".join(rows)))
    assert manifest[2] == manifest[-1]
    assert manifest[0].conversation == manifest[2].conversation
    for index in (1, -2):
        with pytest.raises(ManifestError, match=r"^rows.jsonl, line 2: expected a JSON object, found .* in column"):
            manifest[index]
    with pytest.raises(IndexError):
        manifest[3]
    assert manifest[0:3:2] == [manifest[0], manifest[2]]


def test_a_layout_that_is_understood_nowhere_is_refused_at_once() -> None:
    message = refusal(lines("rows.jsonl", {"path": "a.png", "label": 3}, {"path": "b.png", "label": 4}))
    assert "None of the first 2 rows can be read; rows.jsonl, line 1: expected exactly one of" in message
    assert "found the fields 'path', 'label'" in message


USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
LISTS = chat([IMAGE, text("hi")], [text("hello")])
BAD: dict[str, tuple[Any, str, str]] = {
    "no object": ([1], "malformed row", r"expected a JSON object, found \[1\]"),
    "no fields": ({}, "malformed row", "found the fields of an empty object"),
    "two texts": (
        {**GOOD, "caption": "x"},
        "malformed row",
        "expected exactly one of .*, found the fields 'image', 'text', 'capt",
    ),
    "no text": ({"image": "a.png"}, "malformed row", "found the fields 'image'"),
    "null text": ({"image": "a.png", "text": None}, "no answer", "the answer is null"),
    "empty text": ({"image": "a.png", "text": " \n"}, "no answer", "`text` is empty"),
    "no answer": ({"image": "a.png", "question": "x"}, "no answer", "`answer` is empty"),
    "empty answer": ({"image": "a.png", "question": "x", "answer": ""}, "no answer", "`answer` is empty"),
    "number": ({"image": "a.png", "question": "x", "answer": 3}, "malformed row", "`answer` should be text, found 3"),
    "kind": ({**GOOD, "kind": 3}, "malformed row", "`kind` should be text, found 3"),
    "no picture": ({"text": "red"}, "no picture", "expected an item beside `text`"),
    "empty path": ({"image": "", "caption": "red"}, "no picture", "expected an item beside `caption`"),
    "empty list": ({"images": [], "caption": "red"}, "no picture", "expected an item"),
    "picture of another type": (
        {"image": {"bytes": ""}, "text": "x"},
        "malformed row",
        "'image' should be a path or a li",
    ),
    "pictures named twice": ({**GOOD, "images": ["a.png"]}, "malformed row", "named once, found 'image' and 'images'"),
    "address": ({"image": "https://x.org/a.png", "text": "x"}, "malformed row", "'https://x.org/a.png' is an address"),
    "address in a block": (
        {"messages": chat([{**IMAGE, "url": "http://x/a.png"}], [text("x")])},
        "malformed row",
        "is an address, expected a file; download the picture first",
    ),
    "data": (
        {"image": "data:image/png;base64,A?AA", "text": "x"},
        "malformed row",
        "holds base64, which this does not",
    ),
    "system": (
        {"messages": [{"role": "system", "content": "x"}, USER, ASSISTANT]},
        "malformed row",
        "'system'; put its te",
    ),
    "role": (
        {"messages": [USER, {"role": "tool", "content": "x"}]},
        "malformed row",
        "should be the assistant's, .* 'tool'",
    ),
    "order": (
        {"messages": [ASSISTANT, USER]},
        "malformed row",
        "message 1 should be the user's, found the role 'assistant'",
    ),
    "repeated": ({"messages": [USER, ASSISTANT, ASSISTANT]}, "malformed row", "message 3 should be the user's"),
    "open end": (
        {"messages": [USER, ASSISTANT, USER]},
        "no answer",
        "the last of 3 messages should be the assistant's",
    ),
    "no messages": ({"messages": []}, "no answer", "the last of 0 messages"),
    "empty turn": ({"messages": [USER, {**ASSISTANT, "content": ""}]}, "no answer", "message 2 is an empty answer"),
    "empty user": ({"messages": [{**USER, "content": " "}, ASSISTANT]}, "malformed row", "message 1 is empty"),
    "no role": ({"messages": [{"content": "x"}]}, "malformed row", r"messages.0.role: Field required"),
    "messages as text": ({"messages": "hi"}, "malformed row", "messages: Input should be a valid list, found 'hi'"),
    "strange block": ({"messages": chat([{"type": "video"}])}, "malformed row", "messages.0.content.0.item: .*'video'"),
    "block without text": (
        {"messages": chat([{"type": "text"}])},
        "malformed row",
        "content.0.text.text: Field required",
    ),
    "empty path of a block": (
        {"messages": chat([{**IMAGE, "path": ""}], [text("x")])},
        "malformed row",
        "an item is a path",
    ),
    "too few": ({"images": ["a.png", "b.png"], "messages": LISTS}, "malformed row", "each of 2 pictures, found 1"),
    "too many": ({"messages": LISTS}, "malformed row", "a placeholder <image> for each of 0 pictures, found 1"),
    "unmarked": ({"image": "a.png", "messages": [USER, ASSISTANT]}, "malformed row", "each of 1 pictures, found 0"),
    "picture in an answer": (
        {"image": "a.png", "messages": [USER, {"role": "assistant", "content": "see <image>"}]},
        "malformed row",
        "message 2 is an answer with a picture",
    ),
    "half a character": (
        {"image": "a.png", "text": "\ud800"},
        "malformed row",
        "surrogates not allowed",
    ),
    "answer without a width": ({"image": "a.png", "text": "\u200b "}, "no answer", "`text` is empty"),
    "name twice": ('{"image": "a.png", "text": "x", "text": "y"}', "malformed row", "'text' occurs more than once"),
    "answer beside a caption": (
        {**GOOD, "answer": "y"},
        "malformed row",
        "`answer` beside `question`, found it beside `tex",
    ),
    "empty path in a list": ({"images": ["a.png", ""], "text": "x"}, "malformed row", "a list of paths, found ''"),
    "two pictures of a block": (
        {"messages": chat([{**IMAGE, "path": "a.png", "image": "b.png"}, text("x")])},
        "malformed row",
        "one picture, not one as 'path' and another as 'image'",
    ),
    "picture beside the content": (
        {"messages": [{**USER, "image": "a.png"}, ASSISTANT]},
        "malformed row",
        "beside the chat, not as 'image' here",
    ),
    "open object": ('{"image": "a.png", "text": "x"', "malformed row", "in column 31"),
    "number of many digits": ('{"image": "a.png", "text": ' + "1" * 5000 + "}", "malformed row", "Exceeds the limit"),
    "bytes of another encoding": (b'{"image": "a.png", "text": "gr\xfcn"}', "malformed row", "in UTF-8, found b'.xfcn"),
}


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_tables_have_commas(separator: str) -> None:
    with pytest.raises(
        ManifestError, match=rf"rows.csv, line 1: expected commas .*, found {re.escape(repr(separator))}"
    ):
        Manifest.read(write("rows.csv", f"image{separator}text\na.png{separator}x\n".encode()))


def test_a_prompt_says_something() -> None:
    path = write("rows.jsonl", json.dumps(GOOD).encode())
    with pytest.raises(ManifestError, match="The prompt is empty, expected a question"):
        Manifest.read(path, prompt=" ")


def test_a_class_holds_no_folder() -> None:
    for name in ("cat/1.png", "dog/2.png", "dog/more/3.png"):
        paint(f"data/{name}")
    with pytest.raises(ManifestError, match="'data/dog' should hold the files of one class, found the folder 'more'"):
        Manifest.read("data")


def test_a_digest_of_rows_is_of_what_they_say() -> None:
    write("rows.jsonl", json.dumps(GOOD).encode() + b"\n")
    before = Manifest.read("rows.jsonl").rows_digest()
    write("rows.jsonl", json.dumps(GOOD).encode() + b"\n")
    assert Manifest.read("rows.jsonl").rows_digest() == before
    write("rows.jsonl", json.dumps({**GOOD, "text": "other"}).encode() + b"\n")
    assert Manifest.read("rows.jsonl").rows_digest() != before
    digests = set()
    for name in ("cat/1.png", "dog/2.png", "dog/22.png"):
        paint(f"data/{name}")
        if name != "cat/1.png":
            digests.add(Manifest.read("data").rows_digest())
    assert len(digests) == 2


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_with_a_row_is_one_sentence(fault: str) -> None:
    row, kind, words = BAD[fault]
    raw = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    manifest = Manifest.read(write("rows.jsonl", json.dumps(GOOD).encode() + b"\n" + raw + b"\n"))
    with pytest.raises(ManifestError) as caught:
        manifest[1]
    message = str(caught.value)
    assert message.startswith("rows.jsonl, line 2: ")
    assert re.search(words, message), message
    assert "\n" not in message
    assert message.endswith(".")
    assert caught.value.kind == kind


CELLS = {
    "one cell too few": ("a.png", "expected 2 cells (image, text), found 1: 'a.png'"),
    "one cell too many": ("a.png,red,green", "expected 2 cells (image, text), found 3: 'a.png, red, green'"),
    "no picture": (",red", "expected an item beside `text`"),
    "no text": ("a.png,", "`text` is empty"),
}


@pytest.mark.parametrize("fault", CELLS)
def test_what_is_wrong_with_a_line_of_a_table(fault: str) -> None:
    cells, words = CELLS[fault]
    manifest = Manifest.read(write("rows.csv", f"image,text\na.png,red\n{cells}\n"))
    with pytest.raises(ManifestError) as caught:
        manifest[1]
    assert sentence(str(caught.value)).startswith("rows.csv, line 3: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('image,text\na.png,red\nb.png,"green\n', 3),
        ('image,text\na.png,"red"green\n', 2),
        ("image,text\na.png," + "x" * 200_000 + "\n", 2),
    ],
    ids=["an open quote", "text after a quote", "a long cell"],
)
def test_an_invalid_table_is_refused(text: str, line: int) -> None:
    assert f"a.csv, line {line}: expected cells of CSV, found a mistake (" in refusal(write("a.csv", text))


def test_other_encodings_are_named() -> None:
    table = "image,text\na.png,grün\nb.png,green\n"
    assert "'a.csv' is text in UTF-16, expected UTF-8" in refusal(write("a.csv", table.encode("utf-16")))
    manifest = Manifest.read(write("b.csv", table.encode("latin-1")))
    assert manifest[1].conversation == ask(PROMPT, "green")
    with pytest.raises(
        ManifestError, match=r"^b.csv, line 2: expected text in UTF-8, found b'gr\\xfcn'; convert the file.$"
    ):
        manifest[0]


def test_a_name_stands_once_in_an_object() -> None:
    rows = '[{"image": "a.png", "text": "red"}, {"image": "a.png", "text": {"x": 1, "x": 2}}]'
    manifest = Manifest.read(write("rows.json", rows))
    with pytest.raises(ManifestError, match=r"^rows.json, entry 2: 'x' occurs more than once in one object"):
        manifest[1]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_objects_that_are_nested_without_end(name: str) -> None:
    assert "maximum recursion depth exceeded" in refusal(write(name, "[" * 100_000 + "]" * 100_000))


def test_pipes_are_not_waited_for() -> None:
    os.mkfifo("rows.jsonl")
    assert "'rows.jsonl' is no regular file" in refusal("rows.jsonl")
    assert "cannot be read (File name too long)" in refusal("x" * 5000)


def test_columns_of_the_same_name() -> None:
    assert "line 1: columns should have different names, found 'text'" in refusal(
        write("a.csv", "image,text,text\na,b,c\n")
    )


# --- Examples ---------------------------------------------------------------------------------------------------------


def test_examples_have_their_pictures() -> None:
    rows = [{"images": ["b.png", "a.png"], "question": "which?", "answer": "green, red"}, GOOD]
    data = ManifestConversations(Manifest.read(lines("rows.jsonl", *rows)))
    assert len(data) == 2
    example = data[0]
    assert [picture.getpixel((0, 0)) for picture in example.items["image"]] == [(0, 128, 0), (255, 0, 0)]
    assert example.conversations == [ask("which?", "green, red", ["image"] * 2)]


def test_a_picture_that_cannot_be_read_is_named_with_its_row() -> None:
    write("broken.png", Path("a.png").read_bytes()[:40])
    data = ManifestConversations(Manifest.read(lines("rows.jsonl", GOOD, {**GOOD, "image": "broken.png"})))
    with pytest.raises(
        PictureError, match=r"^rows.jsonl, line 2: 'broken.png' cannot be decoded, expected a whole PNG"
    ):
        data[1]


@pytest.fixture(params=["lines", "list", "table", "classes"])
def many(request: pytest.FixtureRequest) -> Manifest:
    """Seven rows of one colour each, in any layout."""
    rows = [{"image": f"{name}.png", "text": name} for name in "abcdefg"]
    if request.param == "lines":
        return Manifest.read(lines("rows.jsonl", *rows))
    if request.param == "list":
        return Manifest.read(write("rows.json", json.dumps(rows)))
    if request.param == "table":
        return Manifest.read(write("rows.csv", "image,text\n" + "".join(f"{r['image']},{r['text']}\n" for r in rows)))
    for row in rows:
        Path("classes", row["text"]).mkdir(parents=True)
        shutil.copy(row["image"], f"classes/{row['text']}/1.png")
    return Manifest.read("classes")


def test_pickling_keeps_the_rows(many: Manifest) -> None:
    assert list(pickle.loads(pickle.dumps(many))) == list(many)


def summary(batch: list[Any]) -> list[Any]:
    return [(example.items["image"][0].getpixel((0, 0)), example.conversations) for example in batch]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_the_same_examples_in_the_same_order(start: str) -> None:
    from torch.utils.data import DataLoader

    data = ManifestConversations(
        Manifest.read(lines("rows.jsonl", *({"image": f"{name}.png", "text": name} for name in "abcdefgh")))
    )
    alone = [summary([data[i], data[i + 1]]) for i in range(0, 8, 2)]
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=list, multiprocessing_context=start)
    assert [summary(batch) for batch in loader] == alone


def test_mistakes_come_out_of_workers_as_they_are() -> None:
    from torch.utils.data import DataLoader

    data = ManifestConversations(
        Manifest.read(lines("rows.jsonl", GOOD, {"image": "a.png"}, {**GOOD, "image": "no.png"}))
    )
    for index, kind in ((1, ManifestError), (2, PictureError)):
        loader = DataLoader(data, sampler=[index], num_workers=1, collate_fn=list, multiprocessing_context="fork")
        with pytest.raises(kind, match=rf"rows.jsonl, line {index + 1}: "):
            list(loader)


def test_the_digest_is_of_what_is_said_and_shown() -> None:
    rows = [{**GOOD, "kind": "color"}, {"messages": [USER, ASSISTANT]}, {"image": "b.png", "text": "green"}]
    digest = Manifest.read(lines("rows.jsonl", *rows)).digest()
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    for name in ("a.png", "b.png"):
        shutil.copy(name, paint(f"other/pictures/{name}"))
    write("other/rows.json", json.dumps(rows, indent=2))
    assert Manifest.read("other/rows.json", root="other/pictures").digest() == digest  # wherever it is
    others = [
        Manifest.read(lines("1.jsonl", *rows[::-1])),
        Manifest.read(lines("2.jsonl", *rows[:2])),
        Manifest.read(lines("3.jsonl", {**rows[0], "kind": "x"}, *rows[1:])),
        Manifest.read(lines("4.jsonl", {**rows[0], "text": "Red"}, *rows[1:])),
        Manifest.read("rows.jsonl", prompt="What is it?"),
    ]
    digests = [manifest.digest() for manifest in others]
    shutil.copy("c.png", "b.png")
    digests.append(Manifest.read("rows.jsonl").digest())
    assert len({digest, *digests}) == 7
    Path("b.png").unlink()
    with pytest.raises(
        ManifestError, match=r"^rows.jsonl, line 3: 'b.png' cannot be read \(No such file or directory\)"
    ):
        Manifest.read("rows.jsonl").digest()


def test_a_worker_hands_on_what_is_wrong_with_a_picture() -> None:
    from torch.utils.data import DataLoader

    whole = Path("a.png").read_bytes()
    write("cut.png", whole[: len(whole) // 2 + 10])
    write("page.png", "<!doctype html>")
    Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)).save("large.png")
    expected = {"gone.png": "missing", "cut.png": "truncated", "large.png": "too large", "page.png": "unreadable"}
    rows = [{"image": name, "text": "x"} for name in ("a.png", *expected)]
    data = ManifestConversations(Manifest.read(lines("rows.jsonl", *rows)))
    for index, (name, kind) in enumerate(expected.items(), start=1):
        with pytest.raises(PictureError) as caught:
            data[index]
        again = pickle.loads(pickle.dumps(caught.value))
        with pytest.raises(PictureError) as handed_on:
            list(DataLoader(data, sampler=[index], num_workers=1))
        for error in (caught.value, again, handed_on.value):
            assert error.kind == kind
            assert f"rows.jsonl, line {index + 1}: {name!r} " in str(error)

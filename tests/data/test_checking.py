"""Faults put into real data sets are found, each and no other; nothing is found in clean ones."""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.cli import console
from omni.data.checking import check
from omni.data.conversations import ask
from omni.data.manifests import Manifest, ManifestConversations
from omni.data.problems import NOTES, Report, first_of_each, kinds, render
from omni.items import Item
from omni.vision.pictures import MAX_PIXELS

from ..conftest import invoke

OMNI = Path(sys.executable).with_name("omni")
CHECKPOINT = Path("checkpoints/omni_tiny").resolve()


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8))


def paint(name: str, seed: int) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    noise(seed).save(name)
    return name


def write(name: str, content: str | bytes) -> Path:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return Path(name)


def lines(name: str, *rows: Any) -> Path:
    return write(name, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def found(report: Report) -> list[tuple[str, str, str | None]]:
    return [(problem.kind, problem.source, problem.file) for problem in report.problems]


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it."""
    return subprocess.run([OMNI, "check-data", *map(str, arguments)], capture_output=True, text=True, timeout=300)


# --- Clean data -------------------------------------------------------------------------------------------------------


def metadata(part: str, seed: int, suffix: str = "jsonl") -> Path:
    rows = [{"file_name": f"{i}.png", "text": f"noise {i}"} for i in range(3)]
    for i in range(3):
        paint(f"{part}/{i}.png", seed + i)
    if suffix == "csv":
        write(f"{part}/metadata.csv", "file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in rows))
    else:
        lines(f"{part}/metadata.jsonl", *rows)
    return Path(part)


def classes(part: str, seed: int) -> Path:
    for i in range(4):
        paint(f"{part}/{'cat' if i % 2 else 'dog'}/{i}.png", seed + i)
    write(f"{part}/README.md", "about")
    return Path(part)


def chats(part: str, seed: int) -> Path:
    """With everything that is legal: several questions about a picture, two pictures in a row, one twice, none."""
    for i in range(3):
        paint(f"{part}/{i}.png", seed + i)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    return lines(
        f"{part}/rows.jsonl",
        {"image": "0.png", "question": "what?", "answer": "noise"},
        {"image": "0.png", "question": "what else?", "answer": "noise"},
        {"image": "./0.png", "question": "what?", "answer": "much noise"},
        {"image": "1.png", "question": "what?", "answer": "noise"},
        {"images": ["1.png", "2.png"], "question": "the same?", "answer": "no"},
        {"images": ["2.png", "1.png"], "question": "the same?", "answer": "no"},
        {"images": ["1.png", "1.png"], "question": "the same?", "answer": "yes"},
        {"messages": talk},
    )


def captions(part: str, seed: int) -> Path:
    rows = [{"image": os.path.basename(paint(f"{part}/{i}.png", seed + i)), "caption": f"noise {i}"} for i in range(3)]
    return write(f"{part}/captions.json", json.dumps(rows))


LAYOUTS: dict[str, Callable[[str, int], Path]] = {
    "metadata.jsonl": metadata,
    "metadata.csv": lambda part, seed: metadata(part, seed, "csv"),
    "classes": classes,
    "chats": chats,
    "captions": captions,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_found_in_clean_data(layout: str, make_pair: Callable[..., tuple[Any, Any]]) -> None:
    train, test = LAYOUTS[layout]("train", 0), LAYOUTS[layout]("test", 10)
    manifests = {"train": Manifest.read(train), "test": Manifest.read(test)}
    report = check(manifests, make_pair()[1])
    talks = [("text alone", f"{part}/rows.jsonl, line 8", None) for part in ("train", "test")]
    assert found(report) == (talks if layout == "chats" else [])  # no fault, but worth a note
    assert report.clean
    assert report.rows == sum(map(len, manifests.values()))
    assert report.pictures == 8 if layout == "classes" else 6


# --- Every fault ------------------------------------------------------------------------------------------------------


def huge() -> bytes:
    """A small file that claims to be a large picture."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", MAX_PIXELS, 2, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def faulty() -> tuple[Path, list[tuple[str, int, str | None]]]:
    """A folder with every fault once (rows that cannot be read: twice), and what is to be found: kind, line, file."""
    good = [paint(f"data/{i}.png", i) for i in range(4)]
    noise(0).save("data/0.bmp")  # other bytes, the same pixels
    shutil.copy(good[1], "data/copy.png")  # the same bytes
    paint("data/sub/unused.png", 20)
    write("data/notes.txt", "no picture, and so not unused")
    noise(21).save("data/cut.jpg", quality=95)
    write("data/cut.jpg", Path("data/cut.jpg").read_bytes()[:300])
    write("data/page.png", "<!doctype html>")
    write("data/huge.png", huge())
    faults: list[tuple[Any, str, str | None]] = [
        ('{"file_name": "0.png", "text": ', "malformed row", None),
        ({"file_name": "3.png", "label": 4}, "malformed row", None),
        ({"text": "of what?"}, "no picture", None),
        ({"file_name": "0.png", "text": ""}, "no answer", None),
        ({"file_name": "gone.png", "text": "x"}, "missing", "gone.png"),
        ({"file_name": "gone.png", "text": "told once"}, "", None),
        ({"file_name": "page.png", "text": "x"}, "unreadable", "page.png"),
        ({"file_name": "cut.jpg", "text": "x"}, "truncated", "cut.jpg"),
        ({"file_name": "huge.png", "text": "x"}, "too large", "huge.png"),
        ({"file_name": "0.png", "text": "noise 0"}, "duplicate row", None),
        ({"file_name": "0.bmp", "text": "another file"}, "duplicate picture", "0.bmp"),
        ({"file_name": "copy.png", "text": "another file"}, "duplicate picture", "copy.png"),
        ({"file_name": "copy.png", "text": "told once"}, "", None),
        ({"file_name": "3.png", "text": "word " * 400}, "too long", None),
        ({"file_name": "3.png", "text": "its own <|end|> of text"}, "control token", None),
    ]
    rows = [{"file_name": f"{i}.png", "text": f"noise {i}"} for i in range(4)]
    lines("data/metadata.jsonl", *rows, *(row for row, _, _ in faults))
    expected = [(kind, line, file) for line, (_, kind, file) in enumerate(faults, start=5) if kind]
    return Path("data"), expected


def in_full(expected: list[tuple[str, int, str | None]]) -> list[tuple[str, str, str | None]]:
    rows = [(k, f"data/metadata.jsonl, line {line}", file and f"data/{file}") for k, line, file in expected]
    return [*rows, ("unused", "data", "data/sub/unused.png")]


def test_every_fault_is_found_and_no_other(make_pair: Callable[..., tuple[Any, Any]]) -> None:
    folder, expected = faulty()
    test = [
        {"image": "../elsewhere.tiff", "text": "a"},
        {"image": "own.png", "text": "b"},
        {"image": "own.png", "text": "c"},
    ]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    lines(
        "test/rows.jsonl",
        *test,
        {"image": "../data/2.png", "text": "d"},
        {"image_path": "own.png", "messages": talk},
        {"image": "own.png", "answer": "e"},
    )
    noise(3).save("elsewhere.tiff")
    paint("test/own.png", 30)
    manifests = {"train": Manifest.read(folder), "test": Manifest.read("test/rows.jsonl")}
    leaks = [
        ("leak", "test/rows.jsonl, line 1", "test/../elsewhere.tiff"),
        ("leak", "test/rows.jsonl, line 4", "test/../data/2.png"),
    ]
    processor = make_pair()[1]
    for workers in (1, 7):
        report = check(manifests, processor, max_length=500, workers=workers)
        *of_rows, unused = in_full(expected)
        notes = [("text alone", "test/rows.jsonl, line 5", None), ("no words", "test/rows.jsonl, line 6", None)]
        assert found(report) == [*of_rows, *leaks, unused, *notes]  # in the order of the rows
        assert {problem.kind for problem in report.problems} == {*kinds()} - {
            "duplicate sound"
        }  # also that the test leaves none out
        assert not report.clean
    sentences = {problem.kind: problem.sentence for problem in report.problems}
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in sentences.values())
    assert not any(problem.sentence.startswith(problem.source) for problem in report.problems)
    leak = "'test/../data/2.png' of test is the same picture as 'data/2.png' (data/metadata.jsonl, line 3) of train; take it"
    assert sentences["leak"].startswith(leak)
    assert "is the same picture as 'data/1.png' (data/metadata.jsonl, line 2)" in sentences["duplicate picture"]
    assert "repeats data/metadata.jsonl, line 1" in sentences["duplicate row"]
    assert re.match(r"it has \d+ tokens, more than max_length=500; ", sentences["too long"])
    assert sentences["control token"].startswith(
        "it has '<|end|>' in the text of its assistant, expected no control token"
    )
    assert sentences["truncated"].startswith("'data/cut.jpg' cannot be decoded, expected a whole JPEG")


def test_files_that_no_row_names_are_a_note() -> None:
    metadata("data", 0)
    paint("data/more/9.png", 9)
    paint("data/more/8.JPG", 8)
    write("data/more/list.txt", "")
    report = check({"train": Manifest.read("data")})
    assert found(report) == [("unused", "data", "data/more/8.JPG"), ("unused", "data", "data/more/9.png")]
    assert report.clean
    assert {"unused", "text alone", "no words"} == {*NOTES}
    done = invoke("check-data", "data")
    assert done.exit_code == 0
    assert "unused (a note)" in done.stdout
    lines("data/more/metadata.jsonl", {"file_name": "8.JPG", "text": "x"}, {"file_name": "9.png", "text": "y"})
    assert (
        found(check({"train": Manifest.read("data"), "test": Manifest.read("data/more")})) == []
    )  # named by the test set


def test_most_rows_without_a_picture_are_one_note() -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    paint("0.png", 0)
    manifest = Manifest.read(
        lines("rows.jsonl", {"img": "0.png", "messages": talk}, *({"messages": talk, "n": i} for i in "ab"))
    )
    report = check({"train": manifest})
    assert [(problem.kind, problem.source) for problem in report.problems if problem.kind != "duplicate row"] == [
        ("text alone", "rows.jsonl")
    ]


def test_a_file_in_two_classes_and_a_class_without_files() -> None:
    classes("data", 0)
    os.symlink("../cat/1.png", "data/dog/alias.png")
    os.makedirs("data/bird")
    write("data/photo.heic", "of a telephone")
    report = check({"train": Manifest.read("data")})
    assert found(report) == [
        ("duplicate picture", "data/dog/alias.png", "data/dog/alias.png"),
        ("unused", "data", "data/photo.heic"),
        ("unused", "data", "data/bird"),
    ]


def test_a_conversation_longer_than_the_thinker_takes(make_pair: Callable[..., tuple[Any, Any]]) -> None:
    metadata("data", 0)
    manifests = {"train": Manifest.read("data")}
    assert check(manifests, make_pair()[1]).clean
    report = check(manifests, make_pair()[1], max_positions=4)
    assert [problem.kind for problem in report.problems] == ["too long"] * 3
    assert "more than the 4 positions of the language model" in report.problems[0].sentence


def test_every_bad_line_is_reported() -> None:
    metadata("data", 0)
    good = Path("data/metadata.jsonl").read_text().splitlines()
    draw = random.Random(0)
    bad = sorted(draw.sample(range(60), 30))
    lines("data/rows.jsonl", *("{" if i in bad else json.dumps({"image": "0.png", "text": f"{i}"}) for i in range(60)))
    report = check({"train": Manifest.read("data/rows.jsonl")})
    assert found(report) == [("malformed row", f"data/rows.jsonl, line {i + 1}", None) for i in bad]
    assert len(good) == 3


def test_the_same_pixels_are_the_same_however_they_are_stored() -> None:
    picture = noise(0).convert("L")
    picture.save("grey.png")
    picture.convert("RGB").save("colour.png")
    picture.convert("RGBA").save("alpha.tiff")
    turned = Image.Exif()
    turned[0x0112] = 8
    picture.transpose(Image.Transpose.ROTATE_270).save("turned.png", exif=turned)
    picture.rotate(180).save("other.png")
    picture.resize((9, 12)).save("size.png")
    Image.frombytes("L", (9, 12), picture.tobytes()).save("shape.png")  # the same bytes in another shape
    last = np.asarray(picture).copy()
    last[-1, -1] ^= 1
    Image.fromarray(last).save("last.png")
    names = ["grey.png", "colour.png", "alpha.tiff", "turned.png", "other.png", "size.png", "shape.png", "last.png"]
    report = check({"train": Manifest.read(lines("rows.jsonl", *({"image": n, "text": n} for n in names)))})
    assert [problem.file for problem in report.problems] == ["colour.png", "alpha.tiff", "turned.png"]
    assert {problem.kind for problem in report.problems} == {"duplicate picture"}


def test_one_file_under_two_names_is_no_duplicate_but_a_leak() -> None:
    paint("a.png", 0)
    Path("link.png").symlink_to("a.png")
    Path("sub").mkdir()
    rows = [{"image": name, "text": name} for name in ("a.png", "link.png", "sub/../a.png")]
    manifest = Manifest.read(lines("rows.jsonl", *rows))
    assert found(check({"train": manifest})) == []
    test = Manifest.read(lines("test.jsonl", {"image": "link.png", "text": "x"}))
    assert found(check({"train": manifest, "test": test})) == [("leak", "test.jsonl, line 1", "link.png")]


def test_rows_are_duplicates_by_what_they_show_and_say() -> None:
    for name in ("a.png", "copy.png"):
        paint(name, 0)
    paint("b.png", 1)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [
        {"images": ["a.png", "b.png"], "question": "?", "answer": "x"},
        {"images": ["copy.png", "b.png"], "question": "?", "answer": "x", "kind": "other"},
        {"images": ["b.png", "a.png"], "question": "?", "answer": "x"},
        {"messages": talk},
        {"conversations": talk},
        {"image": "gone.png", "text": "x"},
        {"image": "gone.png", "text": "x"},
    ]
    report = check({"train": Manifest.read(lines("rows.jsonl", *rows))})
    assert found(report) == [
        ("duplicate row", "rows.jsonl, line 2", None),
        ("duplicate row", "rows.jsonl, line 5", None),
        ("missing", "rows.jsonl, line 6", "gone.png"),
        ("duplicate row", "rows.jsonl, line 7", None),
        ("text alone", "rows.jsonl, line 4", None),
        ("text alone", "rows.jsonl, line 5", None),
    ]


# --- Tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_a_batch_of_training(make_pair: Callable[..., tuple[Any, Any]]) -> None:
    from omni.data.collate import ConversationCollator

    _, processor = make_pair()
    draw, rows = random.Random(0), []
    for i in range(12):
        shown = draw.choices("abc", k=draw.randrange(4))
        words = " ".join(draw.choices(["red", "what", "<|x|>", "grün", "漢字"], k=draw.randrange(1, 9)))
        turns = ask(words + str(i), "a", [Item("image", f"{name}.png") for name in shown]) + ask(
            "b", words, []
        ) * draw.randrange(2)
        rows.append({"messages": turns})
    for seed, name in enumerate("abc"):
        paint(f"{name}.png", seed)
    data = ManifestConversations(Manifest.read(lines("rows.jsonl", *rows)))
    lengths = [ConversationCollator(processor)([data[i]])["input_ids"].shape[1] for i in range(12)]
    assert len(set(lengths)) > 6
    for limit in (1, sorted(lengths)[6], max(lengths) - 1, max(lengths)):
        report = check({"train": data.manifest}, processor, limit)
        expected = [(f"rows.jsonl, line {i + 1}", n) for i, n in enumerate(lengths) if n > limit]
        long = [problem for problem in report.problems if problem.kind not in NOTES]
        assert [(p.source, int(p.sentence.split()[2])) for p in long] == expected
    everything = ConversationCollator(processor)([data[i] for i in range(12)])  # pictures in some rows only
    assert everything["input_ids"].shape == (12, max(lengths))
    assert everything["pixel_values"].shape[0] == sum(len(row.files) for row in data.manifest)


def test_a_length_without_a_processor_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"max_length=10 needs a processor"):
        check({"train": Manifest.read(metadata("data", 0))}, max_length=10)


# --- Size -------------------------------------------------------------------------------------------------------------


def test_progress_counts_rows() -> None:
    seen: list[int] = []
    check({"train": Manifest.read(chats("a", 0)), "test": Manifest.read(classes("b", 5))}, progress=seen.append)
    assert seen == list(range(1, 13))


def test_memory_does_not_grow_with_the_pictures() -> None:
    """24 pictures of 5 MB, one of which may be open at a time."""
    code = (
        "import resource; from omni.data.checking import check; from omni.data.manifests import Manifest\n"
        "manifest, before = Manifest.read('rows.jsonl'), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert check({'train': manifest}, workers=1).clean\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    for i in range(24):
        Image.new("RGB", (1600, 1050), (i, 0, 0)).save(f"{i}.bmp")
    lines("rows.jsonl", *({"image": f"{i}.bmp", "text": "x"} for i in range(24)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60


# --- The command ------------------------------------------------------------------------------------------------------


def test_clean_data_on_the_command_line() -> None:
    metadata("train", 0), classes("test", 10)
    done = start("train", "--test", "test")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"7 rows \(\d of train and \d of test\), 7 pictures, nothing found\n", done.stdout)


def test_in_a_pipe_progress_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata("train", 0)
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0)
    shown = invoke("check-data", "train", "--sample", 2)
    assert shown.stdout.startswith("a sample of 2 rows, ")
    assert shown.stderr == "reading rows and files: 1 of 2\nreading rows and files: 2 of 2\n"


def test_faults_on_the_command_line() -> None:
    folder, expected = faulty()
    done = start(folder)
    assert (done.returncode, done.stderr) == (1, "")
    assert "19 rows, 10 pictures" in done.stdout
    assert "too long" not in done.stdout  # without a checkpoint
    assert "control token" not in done.stdout
    assert "missing: data/metadata.jsonl, line 9: 'data/gone.png' does not exist in" in done.stdout
    counted = invoke("check-data", folder, "--checkpoint", CHECKPOINT, "--max-length", 500, "--json")
    assert (counted.exit_code, counted.stderr) == (1, "")
    printed = json.loads(counted.stdout)
    problems = [(problem["kind"], problem["source"], problem["file"]) for problem in printed["problems"]]
    assert problems == in_full(expected)
    assert (printed["rows"], printed["pictures"]) == (19, 10)


def test_the_prompt_counts_on_the_command_line() -> None:
    metadata("data", 0)
    counted = ("data", "--checkpoint", CHECKPOINT, "--max-length", 90)
    assert invoke("check-data", *counted).exit_code == 0
    assert "too long" in invoke("check-data", *counted, "--prompt", "what is it " * 30).stdout


def test_wrong_usage_is_one_sentence() -> None:
    metadata("data", 0)
    lines("rows.jsonl", {"image": "0.png", "text": "x"})
    for arguments, words in (
        (["nowhere"], "'nowhere' does not exist"),
        (["rows.jsonl"], "rows.jsonl, line 1: the picture '0.png' does not exist"),
        (["data", "--test", "nowhere"], "'nowhere' does not exist"),
        (["data", "--max-length", 10], "add --checkpoint"),
        (["data", "--checkpoint", "data"], "'data' has no processor_config.json"),
    ):
        done = invoke("check-data", *arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
    assert invoke("check-data", "rows.jsonl", "--root", "data").exit_code == 0


def test_a_listing_is_short_and_says_how_much_it_leaves_out() -> None:
    paint("a.png", 0)
    manifest = Manifest.read(lines("rows.jsonl", {"image": "a.png", "text": "x"}, *["{"] * 5, {"text": "x"}))
    report = check({"train": manifest})
    listing = first_of_each(report, most=2)
    assert [line.split(":")[0] for line in listing] == ["malformed row"] * 3 + ["no picture"]
    assert listing[2] == "malformed row: and 3 more; --json lists them"
    assert list(render(report).columns[1].cells) == ["5", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text")
def test_names_that_are_no_text() -> None:
    for name in (b"x/\xff.png", b"y/1.png"):
        os.makedirs(os.path.dirname(name), exist_ok=True)
        Path(os.fsdecode(name)).write_bytes(b"no picture")
    lines(
        "rows.jsonl",
        {"image": "a\0.png", "text": "x"},
        {"image": "\ud800.png", "text": "x"},
        {"image": "y/1.png", "text": "x"},
    )
    report = check({"rows": Manifest.read("rows.jsonl")})
    assert [problem.kind for problem in report.problems] == ["unreadable"] * 3
    assert json.loads(report.model_dump_json())
    Path("rows.jsonl").unlink()
    report = check({"classes": Manifest.read(".")})
    assert [problem.source for problem in report.problems] == ["x/\\udcff.png", "y/1.png"]
    assert json.loads(report.model_dump_json())

"""Folders, patterns and manifests name their pictures: each once, in order, and nothing that is none."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from omni.data.finding import SourceError, find_files
from omni.data.sources import ManifestError
from omni.registry import get_modality

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, as relative paths are what people type."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find_pictures(sources: Iterable[str | Path]) -> list[str]:
    return find_files(sources, get_modality("image"))


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def refusal(*sources: str) -> str:
    with pytest.raises(SourceError) as caught:
        find_pictures(sources)
    assert str(caught.value).count("\n") == 0
    assert "expected" in str(caught.value)
    return str(caught.value)


def test_a_folder_is_searched_to_its_depths(inside: Path) -> None:
    touch("p/b.JPG", "p/a.png", "p/notes.txt", "p/z/y/x.tiff", "p/z/.hidden.png", "p/.thumbnails/a.png", "p/jpg")
    assert find_pictures(["p"]) == ["p/a.png", "p/b.JPG", "p/z/y/x.tiff"]
    assert find_pictures([Path("p")]) == find_pictures(["p/"]) == find_pictures(["p"])
    assert find_pictures([str(inside / "p")])[0] == str(inside / "p/a.png")


def test_the_order_is_that_of_the_paths_whatever_was_named_first(inside: Path) -> None:
    touch("p/b.png", "p/a.png", "q/a.png", "p/a/c.png")
    expected = ["p/a.png", "p/a/c.png", "p/b.png", "q/a.png"]
    assert find_pictures(["p", "q"]) == find_pictures(["q", "p/*.png", "p"]) == expected == sorted(expected)


def test_links_are_followed_and_circles_end(inside: Path) -> None:
    touch("p/a.png", "elsewhere/b.png")
    os.symlink("../p", "p/itself")
    os.symlink("../elsewhere", "p/there")
    os.symlink("../elsewhere", "p/there_too")
    os.symlink("itself/a.png", "p/c.png")
    os.symlink("nowhere", "p/broken.png")
    found = find_pictures(["p"])
    assert [path for path in found if "there" not in path] == ["p/a.png", "p/broken.png", "p/c.png"]
    assert len([path for path in found if "there" in path]) == 1


def test_patterns(inside: Path) -> None:
    touch("p/a.png", "p/b.jpg", "p/c/d.png", "p/notes.txt", "p/e.png/f.png")
    assert find_pictures(["p/*.png"]) == ["p/a.png"]
    assert find_pictures(["p/*"]) == ["p/a.png", "p/b.jpg"]
    assert find_pictures(["p/**/*.png"]) == ["p/a.png", "p/c/d.png", "p/e.png/f.png"]
    assert find_pictures(["p/[ab].*"]) == ["p/a.png", "p/b.jpg"]


def test_patterns_end_where_folders_link_to_themselves(inside: Path) -> None:
    """Python's `glob` finds each file 41 times where there is one such link, and does not come to an end with two."""
    touch("p/a.png", "p/c/d.png", "p/c/e/a.png", "p/.hidden/a.png")
    for name in ("one", "two", "three"):
        os.symlink("..", f"p/c/{name}")
    for pattern in ("p/**/*.png", "**/*.png", "p/**", "**/**/p/**/**/*.png", f"{inside}/[p]/**/*.png"):
        found = [os.path.relpath(path) for path in find_pictures([pattern])]
        assert found == ["p/a.png", "p/c/d.png", "p/c/e/a.png"], pattern
    assert find_pictures(["**/e/*"]) == ["p/c/e/a.png"]


def test_the_document_says_which_names_count() -> None:
    (sentence,) = re.findall(
        r"^A folder or a pattern.*?lower case\.",
        (ROOT / "docs/embedding.md").read_text("utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert {*re.findall(r"\.[a-z]+", sentence)} == {*get_modality("image").suffixes}


def test_names_that_look_like_patterns_or_are_no_text(inside: Path) -> None:
    touch("p[1]/a*.png", "p[1]/b?.png", "täßt-图片-🖼.png", "line\nbreak.png")
    assert find_pictures(["p[1]"]) == ["p[1]/a*.png", "p[1]/b?.png"]
    assert find_pictures(["p[1]/a*.png"]) == ["p[1]/a*.png"]
    assert find_pictures(["*.png"]) == ["line\nbreak.png", "täßt-图片-🖼.png"]
    broken = os.fsdecode(b"caf\xe9.png")
    touch(f"q/{broken}")
    assert find_pictures(["q"]) == [f"q/{broken}"]


def test_a_manifest_names_its_pictures_each_once(inside: Path) -> None:
    Path("m").mkdir()
    Image.new("RGB", (3, 3)).save("m/a.png")
    rows = [("a.png", "x"), ("missing.png", "y"), ("a.png", "z"), ("no_suffix", "w")]
    Path("m/rows.jsonl").write_text("".join(json.dumps({"image": n, "caption": c}) + "\n" for n, c in rows))
    assert find_pictures(["m/rows.jsonl"]) == ["m/a.png", "m/missing.png", "m/no_suffix"]
    Path("m/list.csv").write_text("image\na.png\nb.png\n")  # nothing has to be said about them
    Path("m/list.jsonl").write_text('{"image": "a.png", "id": 1}\n{"images": ["b.png", "c.png"]}\n')
    assert find_pictures(["m/list.csv"]) == ["m/a.png", "m/b.png"]
    assert find_pictures(["m/list.jsonl"]) == ["m/a.png", "m/b.png", "m/c.png"]
    for bad, reason in (
        ("{", "expected a JSON object"),
        ('{"id": 2}', "exactly one of"),
        ('{"image": ""}', "exactly"),
    ):
        Path("m/broken.jsonl").write_text(f'{{"image": "a.png", "caption": "x"}}\n{bad}\n')
        with pytest.raises(ManifestError, match=rf"broken\.jsonl, line 2: .*{reason}"):
            find_pictures(["m/broken.jsonl"])


def test_one_picture_is_enough_and_none_is_too_few(inside: Path) -> None:
    touch("p/a.png", "q/notes.txt", "list.txt")
    assert find_pictures(["p/a.png"]) == ["p/a.png"]
    assert "'q' holds no picture, expected files that end with .jpg" in refusal("q")
    assert "'q/*' holds no picture" in refusal("p", "q/*")
    assert "'nowhere' does not exist in" in refusal("nowhere")
    assert "'list.txt' is a file of another kind, expected a picture, or a folder, a pattern" in refusal("list.txt")


def test_a_folder_that_may_not_be_read_is_not_left_out_silently(inside: Path) -> None:
    touch("p/a.png", "p/open/b.png", "p/secret/b.png", "p/secret/c/d.png")
    inside.chmod(0o755)
    Path("p/secret").chmod(0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # what is forbidden to others is not forbidden to root
        assert "The folder 'p/secret' cannot be read (Permission denied)" in refusal("p")
        assert find_pictures(["p/*.png", "p/open/*.png"]) == ["p/a.png", "p/open/b.png"]  # who looks elsewhere may
    finally:
        if root:
            os.seteuid(0)
        Path("p/secret").chmod(0o755)

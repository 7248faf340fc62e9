"""Data sets that hold their items in themselves, in the formats of others: written by their libraries, read as by JSON."""

import base64
import io
import json
import pickle
import tarfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from omni.data import arrow
from omni.data.addresses import Limit, fetch
from omni.data.arrow import WINDOW
from omni.data.checking import check
from omni.data.finding import SourceError, find_files
from omni.data.manifests import Manifest, ManifestConversations
from omni.data.sources import ManifestError
from omni.modality import ItemError, LargeItemError
from omni.registry import get_modality

COUNT = 10
WORDS = [f"a bird of kind {number}" for number in range(COUNT)]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sound(number: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(400 + number) / 3).astype(np.float32), 16_000, format="WAV")
    return buffer.getvalue()


ITEMS = {"image": picture, "audio": sound}
SUFFIX = {"image": "png", "audio": "wav"}


def in_lines(folder: Path, modality: str) -> Path:
    """The data set as files and a line of JSON for each."""
    for number in range(COUNT):
        (folder / f"{number}.{SUFFIX[modality]}").write_bytes(ITEMS[modality](number))
    rows = [{modality: f"{number}.{SUFFIX[modality]}", "caption": text} for number, text in enumerate(WORDS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def in_parquet(folder: Path, modality: str) -> Path:
    """Two files, of row groups of three rows."""
    out = folder / "shards"
    out.mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), 2)):
        held = [{"bytes": ITEMS[modality](n), "path": f"{n}.{SUFFIX[modality]}"} for n in numbers.tolist()]
        table = pa.table({modality: held, "caption": [WORDS[n] for n in numbers]})
        pq.write_table(table, out / f"{shard}.parquet", row_group_size=3)
    return out


def in_tars(folder: Path, modality: str) -> Path:
    """Two tar files, with the captions in text files."""
    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), 2)):
        with tarfile.open(folder / f"birds-{shard}.tar", "w") as tar:
            for n in numbers.tolist():
                add(tar, f"{n:03}.{SUFFIX[modality]}", ITEMS[modality](n))
                add(tar, f"{n:03}.txt", WORDS[n].encode())
    return folder / "birds-*.tar"


def saved(folder: Path, modality: str) -> Path:
    """As `datasets` saves it."""
    datasets = pytest.importorskip("datasets")
    feature = {"image": datasets.Image(decode=False), "audio": datasets.Audio(decode=False)}[modality]
    held = [{"bytes": ITEMS[modality](n), "path": None} for n in range(COUNT)]
    made = datasets.Dataset.from_dict({modality: held, "caption": WORDS}).cast_column(modality, feature)
    made.save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def as_messages(folder: Path, modality: str) -> Path:
    """As OpenAI's messages, with the files as data URIs."""
    rows = []
    for n, text in enumerate(WORDS):
        encoded = base64.b64encode(ITEMS[modality](n)).decode()
        parts: dict[str, dict[str, Any]] = {
            "image": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}", "detail": "low"}},
            "audio": {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
        }
        noun = {"image": "picture", "audio": "sound"}[modality]
        asked = [parts[modality], {"type": "text", "text": f"Describe the {noun}."}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "chats.jsonl"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


LAYOUTS = {make.__name__: make for make in (in_parquet, in_tars, saved, as_messages)}


@pytest.mark.parametrize("modality", ITEMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_lines_of_json_do(layout: str, modality: str, tmp_path: Path) -> None:
    """The digest is of what all rows say and of the bytes of all files."""
    expected, found = Manifest.read(in_lines(tmp_path, modality)), Manifest.read(LAYOUTS[layout](tmp_path, modality))
    assert len(found) == COUNT
    assert [row.conversation for row in found] == [row.conversation for row in expected]
    assert found.digest() == expected.digest()
    one, other = (ManifestConversations(each)[COUNT - 1].items[modality][0] for each in (expected, found))
    assert (one.tobytes() if modality == "image" else one.samples.tobytes()) == (
        other.tobytes() if modality == "image" else other.samples.tobytes()
    )
    again = pickle.loads(pickle.dumps(found))
    assert again[7].conversation == found[7].conversation
    assert again.rows_digest() == found.rows_digest()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_row_is_named_and_never_dropped(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ITEMS, "image", lambda n: b"no picture" if n == 6 else picture(n))
    manifest = Manifest.read(LAYOUTS[layout](tmp_path, "image"))
    places = {
        "in_parquet": f"{tmp_path / 'shards/1.parquet'}, row 2",
        "in_tars": f"{tmp_path / 'birds-1.tar'}, sample 2",
        "saved": f"{tmp_path / 'saved'}, row 7",
        "as_messages": f"{tmp_path / 'chats.jsonl'}, line 7",
    }
    with pytest.raises(ItemError, match=f"^{places[layout]}: ") as caught:
        manifest[6].open()
    (problem,) = check({"train": manifest}, workers=2).problems
    assert (problem.source, problem.kind, problem.part) == (places[layout], "unreadable", "train")
    assert str(caught.value) == f"{problem.source}: {problem.sentence}"


def test_a_row_group_is_read_once_while_its_rows_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(in_parquet(tmp_path, "image"))
    read, whole = [], arrow._unpacked
    monkeypatch.setattr(arrow, "_unpacked", lambda file, group: read.append(group) or whole(file, group))
    manifest = pickle.loads(pickle.dumps(manifest))
    for index in [0, 9, 4, 6, 1, 8, 3, 5, 2, 7]:
        manifest[index]
    assert manifest.blocks is not None
    assert list(manifest.blocks) == [3, 2, 3, 2]
    assert len(read) == len(manifest.blocks) == WINDOW


def test_classes_and_columns_are_as_datasets_has_noted_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["wren", "robin"])}
    )
    held = [{"bytes": picture(n), "path": None} for n in range(3)]
    made = datasets.Dataset.from_dict({"img": held, "label": [0, 1, -1]}, features=features)
    made.to_parquet(tmp_path / "birds.parquet")
    made.save_to_disk(tmp_path / "birds")
    for path in ("birds.parquet", "birds"):
        manifest = Manifest.read(tmp_path / path)
        said = [manifest[n].conversation[-1]["content"][0]["text"] for n in range(2)]
        assert said == ["wren", "robin"]
        with pytest.raises(ManifestError, match="row 3: the answer is null"):
            manifest[2]


def test_a_sample_may_hold_json_and_several_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "deep/" + "long" * 60 + "/1.one.png", picture(1))
        add(tar, "deep/" + "long" * 60 + "/1.two.png", picture(2))
        about = {"question": "<image> like <image>?", "answer": "no", "url": "x"}
        add(tar, "deep/" + "long" * 60 + "/1.json", json.dumps(about).encode())
        add(tar, "README", b"of no sample")
        add(tar, "2.png", picture(3))
        add(tar, "2.npy", b"of no modality")
        add(tar, "2.cls", b"7\n")
        add(tar, "3.wav", sound(1))
        add(tar, "3.json", json.dumps({"audio": "3.wav", "caption": "a hum"}).encode())
    rows = list(Manifest.read(tmp_path / "a.tar"))
    assert [len(row.files) for row in rows] == [2, 1, 1]
    assert [row.files[0].modality for row in rows] == ["image", "image", "audio"]
    assert [row.conversation[-1]["content"][0]["text"] for row in rows] == ["no", "7", "a hum"]
    assert rows[0].files[1].data == picture(2)


def test_chats_of_arrow_name_the_items_of_their_row_or_none(tmp_path: Path) -> None:
    """As trl writes them: a column of lists of items, and blocks that have every field."""
    asked = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    said = [{"type": "text", "text": "a wren"}]
    rows = [
        {"images": [{"bytes": picture(1), "path": None}], "messages": turns(asked, said)},
        {"images": [], "messages": turns([{"type": "text", "text": "well?"}], said)},
    ]
    (tmp_path / "chats").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats" / "0.parquet")
    first, second = Manifest.read(tmp_path / "chats")
    assert [block["type"] for block in first.conversation[0]["content"]] == ["image", "text"]
    assert first.files[0].data == picture(1)
    assert second.files == ()


def turns(*contents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[place % 2], "content": each} for place, each in enumerate(contents)]


def test_items_without_a_path_have_no_row_in_a_table_of_vectors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="line 1 holds a picture in itself, expected the path of a file"):
        find_files([as_messages(tmp_path, "image")], get_modality("image"))


def llava(folder: Path) -> Path:
    (folder / "images").mkdir()
    (folder / "images" / "1.png").write_bytes(picture(1))
    chat = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A wren."}]
    path = folder / "llava.json"
    path.write_text(json.dumps([{"id": "1", "image": "1.png", "conversations": chat}]))
    return path


def test_the_json_of_llava_with_its_folder_of_pictures(tmp_path: Path) -> None:
    (row,) = Manifest.read(llava(tmp_path), root=tmp_path / "images")
    assert [block["type"] for block in row.conversation[0]["content"]] == ["image", "text"]
    assert row.open()["image"][0].size == (4, 5)


# --- Addresses --------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Any:
    """A file system of fsspec's."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_addresses_are_read_where_they_are_allowed(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/a.png", picture(1))
    (tmp_path / "rows.csv").write_text("image,caption\nmemory://a.png,a wren\nmemory://b.png,a robin\n")
    with pytest.raises(ManifestError, match="is an address, expected a file; download the picture first, or allow it"):
        Manifest.read(tmp_path / "rows.csv")
    manifest = Manifest.read(tmp_path / "rows.csv", addresses=tmp_path / "kept")
    assert manifest[0].open()["image"][0].size == (4, 5)
    with pytest.raises(ItemError, match=r"rows.csv, line 3: 'memory://b.png' cannot be fetched"):
        manifest[1].open()
    memory.rm("/a.png")
    assert manifest[0].open()["image"][0].size == (4, 5), "it is fetched once"
    assert [file.name[:1] for file in (tmp_path / "kept").iterdir()] != ["."]


def test_a_data_set_at_an_address(memory: Any, tmp_path: Path) -> None:
    for file in in_parquet(tmp_path, "image").iterdir():
        memory.pipe(f"/birds/{file.name}", file.read_bytes())
    with pytest.raises(ManifestError, match="is an address"):
        Manifest.read("memory://birds/*.parquet")
    manifest = Manifest.read("memory://birds/*.parquet", addresses=tmp_path / "kept")
    assert manifest.digest() == Manifest.read(tmp_path / "shards").digest()
    assert len(Manifest.read("memory://birds/0.parquet", addresses=tmp_path / "kept")) == 5
    with pytest.raises(ManifestError, match="cannot be fetched"):
        Manifest.read("memory://birds/9.parquet", addresses=tmp_path / "kept")


def test_pictures_on_the_web(tmp_path: Path) -> None:
    """A server of this machine; the second picture is cut off, and the third is not there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"/a.png?size=3": picture(1), "/cut.png": picture(2)}
            data = known.get(self.path)
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write((data or b"")[: 20 if self.path == "/cut.png" else None])

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        rows = [{"file_name": f"{base}/{name}", "caption": "x"} for name in ("a.png?size=3", "cut.png", "no.png")]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        manifest = Manifest.read(tmp_path / "rows.jsonl", addresses=tmp_path / "kept", allow_private=True)
        assert manifest[0].open()["image"][0].size == (4, 5)
        for place, words in ((1, "20 bytes of"), (2, "404")):
            with pytest.raises(ItemError, match=f"line {place + 1}: .* cannot be fetched .*{words}"):
                manifest[place].open()
        server.shutdown()
    assert len(list((tmp_path / "kept").iterdir())) == 1


class Unbounded(BaseHTTPRequestHandler):
    """A server that gives bytes without end, or one now and then, or none; in its headers, too; or promises too many."""

    def do_GET(self) -> None:
        try:
            if self.path == "/late":
                return self._drip(b"X-Wait: 1\r\n")
            self.send_response(200)
            if self.path == "/promise":
                self.send_header("Content-Length", str(10**12))
            self.end_headers()
            while self.path == "/endless":
                self.wfile.write(bytes(2**16))
            if self.path == "/drip":
                self._drip(b"x")
            over.wait(60)
        except OSError:  # the client has gone
            pass

    def _drip(self, data: bytes) -> None:
        if self.path == "/late":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not over.wait(0.05):
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


over = threading.Event()
"""Set when the test is over, so that no thread of the server stays."""


def test_what_an_address_gives_is_bounded_in_size_and_time(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Unbounded) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        try:
            with pytest.raises(
                LargeItemError, match=r"endless' is too large, expected at most 1,000,000 bytes, found more"
            ):
                fetch(f"{base}/endless", tmp_path / "a", Limit(1_000_000, 60), allow_private=True)
            for name in ("drip", "silent", "late"):
                with pytest.raises(
                    ItemError, match=f"{name}' takes longer than 1 seconds; try again, or download it first"
                ):
                    fetch(f"{base}/{name}", tmp_path / "a", Limit(1_000_000, 1), allow_private=True)
            (tmp_path / "rows.csv").write_text(f"image,caption\n{base}/promise,x\n")
            row = Manifest.read(tmp_path / "rows.csv", addresses=tmp_path / "kept", allow_private=True)[0]
            with pytest.raises(
                LargeItemError, match=r"line 2: .*expected at most 536,870,912 bytes, found 1,000,000,000,000"
            ):
                row.open()
        finally:
            over.set()
            server.shutdown()
    assert not [*(tmp_path / "kept").iterdir()]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["rows.csv"]


# --- What is refused --------------------------------------------------------------------------------------------------


def cut(folder: Path) -> Path:
    path = folder / "cut.tar"
    in_tars(folder, "image")
    path.write_bytes((folder / "birds-0.tar").read_bytes()[:1500])
    return path


def no_parquet(folder: Path) -> Path:
    path = folder / "no.parquet"
    path.write_bytes(b"PAR1 is how it begins")
    return path


def other_columns(folder: Path) -> Path:
    in_parquet(folder, "image")
    pq.write_table(pa.table({"image": [picture(1)], "note": ["x"]}), folder / "shards" / "2.parquet")
    return folder / "shards"


def parts(folder: Path) -> Path:
    out = in_parquet(folder, "image")
    (out / "0.parquet").rename(out / "train-0.parquet")
    (out / "1.parquet").rename(out / "test-0.parquet")
    return out


def mixed_kinds(folder: Path) -> Path:
    out = in_parquet(folder, "image")
    (out / "1.tar").write_bytes(b"")
    return out


def compressed(folder: Path) -> Path:
    (folder / "a.tar.gz").write_bytes(b"x")
    return folder / "a.tar.gz"


def saved_parts(folder: Path) -> Path:
    (folder / "all" / "train").mkdir(parents=True)
    (folder / "all" / "dataset_dict.json").write_text("{}")
    return folder / "all"


REFUSED = {
    cut: r"is damaged or cut off at byte \d+",
    no_parquet: "is no whole Parquet file",
    other_columns: r"has other columns than .*\(caption, note\)",
    parts: r"holds the files of test, train; name those of one part by a pattern",
    mixed_kinds: "holds files of several kinds",
    compressed: "is compressed",
    saved_parts: "holds the parts 'train'; name one of these folders",
}


def test_a_value_that_is_stored_once_and_read_often_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow, "MOST_BYTES", 2**20)
    monkeypatch.setattr(arrow, "AT_ONCE", 2**16)
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), pa.array([picture(1) + bytes(9_000)]))
    table = pa.table({"image": once, "caption": ["a wren"] * 400})
    pq.write_table(table, tmp_path / "many.parquet", store_schema=False)
    assert (tmp_path / "many.parquet").stat().st_size < 2**15
    read, whole = [], arrow._unpacked
    monkeypatch.setattr(arrow, "_unpacked", lambda file, group: read.append(group) or whole(file, group))
    with pytest.raises(
        ManifestError, match=r"row 1: its row group 0 has more than 1,048,576 bytes once it is unpacked"
    ):
        Manifest.read(tmp_path / "many.parquet")
    assert read == [0]  # for all of its rows
    monkeypatch.setattr(arrow, "MOST_BYTES", 2**23)
    assert len(Manifest.read(tmp_path / "many.parquet")[399].files[0].data or b"") == len(picture(1)) + 9_000


def tar_of(header: bytes, data: bytes) -> bytes:
    """A tar file with this header, whose checksum is made right."""
    header = header[:148] + b" " * 8 + header[156:]
    header = header[:148] + f"{sum(header):06o}\0 ".encode() + header[156:]
    return header + data.ljust(-len(data) % 512 + len(data), b"\0") + bytes(1024)


def odd_tars() -> dict[str, bytes]:
    plain = tarfile.TarInfo("1.png").tobuf(tarfile.USTAR_FORMAT)
    sparse = tarfile.TarInfo("1.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "1.png"}
    held = b"1\n0\n512\n".ljust(512, b"\0") + picture(1).ljust(512, b"\0")
    sparse.size = len(held)
    with_holes = sparse.tobuf(tarfile.PAX_FORMAT)
    long = bytearray(tarfile.TarInfo("1.png").tobuf(tarfile.USTAR_FORMAT))
    long[156:157] = b"x"
    return {
        "no number": tar_of(plain[:124] + b"abc".ljust(12, b"\0") + plain[136:], b""),
        "endless": tar_of(bytes(long[:124]) + b"\x80" + b"\xff" * 11 + bytes(long[136:]), b"x" * 600),
        "holes": with_holes + held + bytes(1024),
        "bad holes": with_holes + picture(1).ljust(1024, b"\0") + bytes(1024),
    }


@pytest.mark.parametrize("name", odd_tars())
def test_headers_of_a_tar_file_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "odd.tar").write_bytes(odd_tars()[name])
    with pytest.raises(ManifestError, match="is damaged or cut off at byte|cannot be read there"):
        Manifest.read(tmp_path / "odd.tar")


@pytest.mark.parametrize("about", [b"[" * 100_000, b"\xff", b"[1]", b'{"text": 1, "text": 2}', b"NaN", b"9" * 5000])
def test_json_in_a_tar_file_is_read_as_everywhere(about: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", picture(1))
        add(tar, "1.json", about)
    with pytest.raises(ManifestError, match="sample 1: '1.json': (expected|'text' occurs more than once)"):
        Manifest.read(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "noted",
    [1, "x", [1], {"image": 3}, {"caption": {"_type": "ClassLabel", "names": 3}}, {"label": {"_type": "ClassLabel"}}],
    ids=str,
)
def test_notes_of_datasets_that_are_none_change_nothing(noted: Any, tmp_path: Path) -> None:
    table = pa.table({"image": [picture(1)], "caption": ["a wren"]})
    about = {"huggingface": json.dumps({"info": {"features": noted}})}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")
    assert Manifest.read(tmp_path / "a.parquet")[0].conversation[-1]["content"][0]["text"] == "a wren"


def test_values_that_are_none_are_refused(tmp_path: Path) -> None:
    text = pa.array([b"a wren", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"image": [picture(1)] * 2, "caption": text}), tmp_path / "a.parquet")
    manifest = Manifest.read(tmp_path / "a.parquet")
    with pytest.raises(ManifestError, match=r"row 2: it holds a value that is not valid \(.*\); write the file again"):
        manifest[1]
    lines = [
        {"messages": [{"role": "user", "content": [{"type": {"x": 1}}]}, {"role": "assistant", "content": "a"}]},
        {"file_name": [], "image": {"bytes": None, "path": 3}, "caption": "a"},
    ]
    for row in lines:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        with pytest.raises(ManifestError):
            Manifest.read(tmp_path / "a.jsonl")
    held = pa.array([{"bytes": picture(1), "path": 7}])
    pq.write_table(pa.table({"file_name": held, "caption": ["a"]}), tmp_path / "a.parquet")
    assert Manifest.read(tmp_path / "a.parquet")[0].open()["image"]


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_cannot_be_read_is_one_sentence(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=REFUSED[make]) as caught:
        Manifest.read(make(tmp_path))
    assert "; " in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_pattern_without_files(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="matches no file; check the pattern"):
        Manifest.read(tmp_path / "*.tar")


def test_a_sample_of_each_set_is_checked_and_train_is_told_from_test(tmp_path: Path) -> None:
    shards = in_parquet(tmp_path, "image")
    manifests = {"train": Manifest.read(shards), "test": Manifest.read(shards / "0.parquet")}
    report = check(manifests, workers=1)
    assert report.parts == {"train": 10, "test": 5}
    assert report.counted == "15 rows (10 of train and 5 of test), 10 pictures"
    assert {(problem.kind, problem.part) for problem in report.problems} == {("leak", "test")}
    sample = check(manifests, sample=3, workers=1)
    assert sample.parts == {"train": 3, "test": 3}
    assert sample.counted.startswith("a sample of 6 rows (3 of train and 3 of test)")


def rows_of(numbers: Sequence[int]) -> str:
    return "".join(json.dumps({"image": "0.png", "caption": str(number)}) + "\n" for number in numbers)


def test_a_row_is_read_from_its_file_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff\n" + rows_of(range(50)) + "\n \n" + rows_of(range(50, 60)))
    manifest = Manifest.read(path)
    assert [row.conversation[-1]["content"][0]["text"] for row in manifest] == [str(n) for n in range(60)]
    assert manifest.source(50) == f"{path}, line 54"
    path.write_text("")
    with pytest.raises(ManifestError, match="line 54: the file is shorter than when it was opened"):
        manifest[50]

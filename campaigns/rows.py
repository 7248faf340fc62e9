"""Odd rows of data sets in all layouts, and damaged files of them: each row is read, or refused in a sentence.

A value anywhere in a row becomes one of another kind or size, or goes. So do the notes of `datasets` in a Parquet file, and
the members of a tar file get other names, types and sizes. Files are damaged as in `damage`. What falls through: a process
that dies or takes more than ten seconds, any exception but those that say in a sentence what is wrong, a word on the
terminal. Rows that can be read count as unchanged.
"""

import base64
import csv
import hashlib
import io
import json
import random
import struct
import tarfile
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from campaigns.damage import PATIENCE, Look, Reader, mutants
from campaigns.shapes import GONE, VALUES, changed, paths
from campaigns.tally import Tally

KINDS = ("jsonl", "json", "csv", "parquet", "tar")
ODD: list[Any] = [
    "/dev/zero",
    "/proc/self/environ",
    ".",
    "..",
    "a\0b",
    "~",
    "https://example.org/a.png",
    "file:" + "//" + "/etc/passwd",
    "\x1b[31m",
    "data:image/png;base64,",
    "data:image/png;base64,AAA",
    "data:image/png;base64,@@@@",
    "data:,x",
    "data:text/html;base64,AAAA",
    "<image>" * 3,
    "<audio>",
    b"",
    b"\x89PNG\r\n\x1a\n",
    {"bytes": b"x", "path": "a.png"},
    {"bytes": None, "path": None},
    {"bytes": b"", "path": "\ud800"},
    {"url": {"url": "a"}},
    [{"type": "image"}],
    [{"type": "image", "image": "a.png", "path": "b.png"}],
    [[[[]]]],
    10**400,
    "9" * 5000,
]


class Refusal(Exception):
    """A file or a row is refused in a sentence."""


def run(seed: int, count: int, seconds: float) -> Tally:
    """Read so many odd files, or as many as there is time for."""
    end, chance = time.monotonic() + seconds, random.Random(seed)
    tried = refused = unchanged = 0
    fallen: list[str] = []
    plain = {"csv": rows()[5:], "parquet": rows()[:1], "tar": rows()[:1]}
    whole = {f"{kind} whole": written(kind, plain.get(kind, rows()), chance=None) for kind in KINDS}
    damaged = mutants(whole, {}, seed)
    reader = Reader("campaigns.rows", 0x55)
    try:
        for name, data in whole.items():
            reader.send(name.split()[0].encode() + b"\0" + data)
            if "read" not in (found := reader.answer(PATIENCE)):
                fallen.append(f"rows, seed {seed}: the {name} is not read: {found}")
        while tried < count and time.monotonic() < end:
            if chance.random() < 0.3:
                mutant = next(damaged)
                name, kind, data = mutant.name, mutant.name.split()[1], mutant.data
            else:
                name, kind, data = odd(chance)
            reader.send(kind.encode() + b"\0" + data)
            found = reader.answer(PATIENCE)
            tried += 1
            refused += "refused" in found
            unchanged += "read" in found
            if "fell" in found:
                fallen.append(f"rows, seed {seed}, {tried}, {name}: {found['fell']}")
    finally:
        reader.stop()
    return Tally(tried, refused, unchanged, tuple(fallen))


def picture() -> bytes:
    """A whole PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(stream, "PNG")
    return stream.getvalue()


def sound() -> bytes:
    """A whole WAV file of a tenth of a second."""
    samples = struct.pack("<1600h", *(round(9000 * (number % 40 / 20 - 1)) for number in range(1600)))
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16)
    rest = b"WAVE" + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(rest)) + rest


def rows() -> list[dict[str, Any]]:
    """Rows as they should be, of each kind that there is."""
    drawn = "data:image/png;base64," + base64.b64encode(picture()).decode()
    heard = {"data": base64.b64encode(sound()).decode(), "format": "wav"}
    blocks = [{"type": "image_url", "image_url": {"url": drawn}}, {"type": "text", "text": "what is it"}]
    said = {"role": "assistant", "content": "a square"}
    return [
        {"image": drawn, "caption": "a red square"},
        {
            "images": [drawn, drawn],
            "question": "<image> or <image>",
            "answer": "both",
            "kind": "which",
            "words": ["a", "b"],
        },
        {"messages": [{"role": "user", "content": blocks}, said]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": heard}]}, said]},
        {
            "image": drawn,
            "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "it"}],
        },
        {"file_name": "a.png", "text": "a file"},
    ]


def odd(chance: random.Random) -> tuple[str, str, bytes]:
    """A file with a value that is none: what it is, its kind, and its bytes."""
    kind, row = chance.choice(KINDS), chance.choice(rows())
    for _ in range(chance.choice((1, 1, 1, 2))):
        if not (places := [*paths(row)]):
            break
        path = chance.choice(places)
        value = chance.choice([*VALUES, *ODD, GONE])
        row = changed(row, path, value)
        name = f"{kind} {'.'.join(map(str, path))} {'gone' if value is GONE else repr(value)[:60]}"
    return name, kind, written(kind, [row], chance)


def written(kind: str, several: list[dict[str, Any]], chance: random.Random | None) -> bytes:
    """A file of this kind with these rows; by chance with other oddities of its kind."""
    if kind == "parquet":
        return _parquet(several, chance)
    if kind == "tar":
        return _tar(several, chance)
    if kind == "csv":
        return _csv(several)
    texts = [json.dumps(row, default=lambda value: value.decode("latin-1")) for row in several]
    return (f"[{','.join(texts)}]" if kind == "json" else "\n".join(texts)).encode()


def _csv(several: list[dict[str, Any]]) -> bytes:
    columns = list(dict.fromkeys(key for row in several for key in row))
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(columns)
    for row in several:
        if all(isinstance(value, str) for value in row.values()):
            writer.writerow([row.get(column, "") for column in columns])
    return stream.getvalue().encode(errors="surrogatepass")


def _parquet(several: list[dict[str, Any]], chance: random.Random | None) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [picture()], "caption": ["what Arrow has no type for"]})
    with suppress(pa.ArrowException, OverflowError, UnicodeError, ValueError, TypeError):
        table = pa.Table.from_pylist([row for row in several if row.keys() == several[0].keys()])
    noted: Any = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a"]}}}}
    if chance is not None:
        if chance.random() < 0.5:
            noted = changed(noted, chance.choice([*paths(noted)]), chance.choice([*VALUES, GONE]))
        if chance.random() < 0.3:
            values = chance.choice(([0], [-1], [None], [2**40], ["a"], [1.5], [[0]]))
            table = pa.table({"image": [picture()], "label": values})
    about = {"huggingface": json.dumps(noted)}
    stream = io.BytesIO()
    try:
        pq.write_table(table.replace_schema_metadata(about), stream)
    except pa.ArrowException:  # a type that Parquet lacks
        return _parquet([{"caption": "without an item"}], None)
    return stream.getvalue()


def _tar(several: list[dict[str, Any]], chance: random.Random | None) -> bytes:
    stream = io.BytesIO()
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    tar_format = formats[1] if chance is None else chance.choice(formats)
    with tarfile.open(fileobj=stream, mode="w", format=tar_format, errors="surrogateescape") as tar:
        for number, row in enumerate(several):
            about = {key: value for key, value in row.items() if key != "image"}
            files = {"png": picture(), "json": json.dumps(about, default=repr).encode()}
            if "caption" in row:
                files["txt"] = str(row["caption"]).encode(errors="replace")
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{number:05}.{suffix}")
                info.size = len(data)
                if chance is not None and chance.random() < 0.2:
                    data = _strange(info, data, chance)
                with suppress(ValueError, UnicodeError):  # what this format cannot hold
                    tar.addfile(info, io.BytesIO(data))
    data = stream.getvalue()
    if chance is not None and chance.random() < 0.2:  # a size that is none, with a checksum that is right
        digits = chance.choice((b"77777777777", b"00000000000", b"-0000000001", b"\x80" + b"\xff" * 10, b"abc"))
        header = bytearray(data[:512])
        header[124:136] = digits.ljust(12, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        data = bytes(header) + data[512:]
    return data


def _strange(info: tarfile.TarInfo, data: bytes, chance: random.Random) -> bytes:
    """Give a member another name, type or content."""
    way = chance.randrange(4)
    if way == 0:
        info.name = chance.choice(
            ("../a.png", "/etc/a.png", "a" * 300 + ".png", ".hidden", "noname", "é.png", "0.", "0..png")
        )
    elif way == 1:
        info.type = chance.choice(
            (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE)
        )
        info.linkname = chance.choice(("00000.png", "/etc/passwd", ""))
    elif way == 2:
        data = chance.choice((b"", b"[" * 100_000, b"\xff\xfe", b"null", b"{}", b'{"image": "00000.png"}'))
        info.size = len(data)
    else:
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999"}
    return data


def look() -> Look:
    """What a process makes of a file: its suffix, a zero, and its bytes."""
    from omni.data.manifests import Manifest
    from omni.data.sources import ManifestError
    from omni.modality import ItemError

    place = TemporaryDirectory()
    folder = Path(place.name)
    (folder / "a.png").write_bytes(picture())

    def read(sent: bytes) -> tuple[str, bytes]:
        suffix, _, data = sent.partition(b"\0")
        path = folder / f"rows.{suffix.decode()}"
        path.write_bytes(data)
        total = hashlib.sha256()
        try:
            manifest = Manifest.read(path)
            for row in manifest:
                total.update(repr((row.conversation, row.kind, row.words)).encode())
                for items in row.open().values():
                    total.update(repr(items).encode())
            total.update(manifest.digest().encode())
        except (ManifestError, ItemError) as error:
            raise Refusal(str(error)) from error
        return f"{len(manifest)} rows", total.digest() + bytes([place is None])

    return Look(read, Refusal)

"""Search in tables that `embed` wrote of real files, beside an independent computation on the encoder itself."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from omni import OmniAudioConfig, OmniAudioModel, OmniFeatureExtractor, OmniImageProcessor
from omni.checkpoints.folder import CheckpointError
from omni.embedding import SearchError, duplicates, embed, search
from omni.embedding.columns import original, written
from omni.embedding.table import TableError
from omni.vision.pictures import read_picture

from ..conftest import invoke

Make = Callable[..., Path]


def reference(checkpoint: Path, files: list[Path]) -> np.ndarray:
    """Unit vectors of files, by transformers alone: one file at a time, float64 lengths."""
    from transformers import AutoModel

    model, processor = AutoModel.from_pretrained(checkpoint).eval(), OmniImageProcessor.from_pretrained(checkpoint)
    rows = []
    for file in files:
        with torch.no_grad():
            cls = model(**processor(read_picture(file), return_tensors="pt")).cls[0, 0].double().numpy()
        rows.append(cls / np.sqrt((cls**2).sum()))
    return np.array(rows)


@pytest.fixture
def table(save_encoder: Make, make_pictures: Make, tmp_path: Path) -> Callable[..., tuple[Path, list[Path], Path]]:
    """`table(count, **options)`: a table of so many pictures, the pictures in order, and the encoder."""

    def make(count: int, **options: Any) -> tuple[Path, list[Path], Path]:
        folder, encoder = make_pictures(count), save_encoder()
        output = tmp_path / options.pop("output", "out.parquet")
        embed([folder], encoder, output, batch_size=4, threads=1, **options)
        return output, sorted(path for path in folder.rglob("*") if path.is_file()), encoder

    return make


@pytest.mark.parametrize("options", [{}, {"output": "parts", "shard_rows": 4}, {"normalize": True}], ids=str)
def test_what_is_found_is_what_the_encoder_itself_finds(table: Any, options: dict[str, Any]) -> None:
    path, files, encoder = table(11, **options)
    vectors = reference(encoder, files)
    for wanted in (0, 7):
        similar = vectors @ vectors[wanted]
        order = np.argsort(-similar)[:5]
        hits = search(path, like=files[wanted], most=5)
        assert [hit.file for hit in hits] == [files[row] for row in order]
        assert [hit.similarity for hit in hits] == pytest.approx(similar[order].tolist(), abs=1e-5)
    assert len(search(path, like=files[0], most=50)) == 11


def test_normalised_vectors_have_length_one_and_the_same_direction(table: Any) -> None:
    path, files, encoder = table(5, normalize=True)
    rows = np.array(pq.read_table(path)["embedding"].to_pylist())
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    assert rows == pytest.approx(reference(encoder, files), abs=1e-5)


def test_an_index_finds_what_comparing_all_finds(table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usearch")
    path, files, _ = table(30)
    shutil.copy(files[3], files[3].with_name("z" + files[3].name))
    embed([files[0].parents[1]], tmp_path / "omni_vision_0", tmp_path / "all.parquet", threads=1)
    exact = search(tmp_path / "all.parquet", like=files[3], most=4), duplicates(tmp_path / "all.parquet", 0.9999)
    monkeypatch.setattr("omni.embedding.searching.EXACT", 10)
    for _ in range(2):  # it is made, and taken from beside the table
        found = search(tmp_path / "all.parquet", like=files[3], most=4), duplicates(tmp_path / "all.parquet", 0.9999)
        assert [hit.path for hit in found[0]] == [hit.path for hit in exact[0]]
        assert [hit.similarity for hit in found[0]] == pytest.approx([hit.similarity for hit in exact[0]], abs=1e-5)
        assert [[hit.path for hit in group] for group in found[1]] == [
            [hit.path for hit in group] for group in exact[1]
        ]
    (index,) = tmp_path.glob("all.parquet.*.usearch")
    damaged = bytearray(index.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    index.write_bytes(damaged)
    with pytest.raises(SearchError, match="usearch' is damaged: its name has another checksum; remove it"):
        search(tmp_path / "all.parquet", like=files[3])


def test_duplicates_are_groups_of_files_that_are_nearly_the_same(
    make_pictures: Make, save_encoder: Make, tmp_path: Path
) -> None:
    folder = make_pictures(8)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    shutil.copy(files[2], folder / "copy.png")
    Image.open(files[2]).save(folder / "again.png")
    shutil.copy(files[5], folder / "other.png")
    embed([folder], save_encoder(), tmp_path / "out.parquet", threads=1)
    groups = duplicates(tmp_path / "out.parquet", 0.99999)
    names = {frozenset(hit.file.name for hit in group) for group in groups}
    assert names == {frozenset({files[2].name, "copy.png", "again.png"}), frozenset({files[5].name, "other.png"})}
    assert all(hit.similarity == pytest.approx(1, abs=1e-5) for group in groups for hit in group)
    assert len(duplicates(tmp_path / "out.parquet", -1)) == 1, "all are of one group"


def test_another_encoder_is_refused(table: Any, save_encoder: Make) -> None:
    path, files, encoder = table(3)
    with pytest.raises(
        SearchError, match="was made by another encoder .*, which has other weights; name the right one"
    ):
        search(path, like=files[0], checkpoint=save_encoder(seed=1))
    moved = encoder.rename(encoder.with_name("moved"))
    with pytest.raises(SearchError, match="which is not there; name its folder with --checkpoint"):
        search(path, like=files[0])
    assert search(path, like=files[0], checkpoint=moved)[0].file == files[0]
    OmniImageProcessor(size={"height": 24, "width": 24}).save_pretrained(moved)
    with pytest.raises((SearchError, CheckpointError)):
        search(path, like=files[0], checkpoint=moved)


def test_sounds_are_searched_and_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    OmniAudioModel(OmniAudioConfig(**small, stem_channels=8)).save_pretrained(tmp_path / "hearing")
    OmniFeatureExtractor().save_pretrained(tmp_path / "hearing")
    (tmp_path / "sounds").mkdir()
    for tone in range(1, 6):
        wave = np.sin(np.arange(8000) * tone / 10).astype(np.float32)
        soundfile.write(tmp_path / "sounds" / f"{tone}.wav", wave, 16_000)
    embed([tmp_path / "sounds"], tmp_path / "hearing", tmp_path / "out.parquet", threads=1)
    found = invoke("search", tmp_path / "out.parquet", "--like", tmp_path / "sounds" / "3.wav", "--most", 2, "--sheet",
                   tmp_path / "sheet.png")  # fmt: skip
    assert found.exit_code == 0, found.stderr
    assert found.stdout.splitlines()[0] == f"1.000  {tmp_path / 'sounds' / '3.wav'}"
    drawn = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert drawn.shape[1] > 300
    assert (drawn[8:168, 8:168] != 255).mean() > 0.1, "the sound is drawn"


def test_on_the_command_line(table: Any, tmp_path: Path) -> None:
    path, files, _ = table(4)
    shutil.copy(files[1], files[1].with_name("zz.jpg"))
    found = json.loads(invoke("search", path, "--like", files[1], "--most", 2, "--json").stdout)
    assert [hit["path"] for hit in found] == [hit.path for hit in search(path, like=files[1], most=2)]
    assert invoke("duplicates", path, "--least", 0.9999999).stdout == "0 groups of 0 files that are nearly the same\n"
    for arguments, words in (
        (["search", path], "either --like with a file or --text"),
        (["search", path, "--like", files[0], "--text", "x"], "either --like with a file or --text"),
        (["search", tmp_path / "no.parquet", "--like", files[0]], "does not exist, expected a table"),
        (["search", files[0], "--like", files[0]], "is not a table that `omni embed` wrote"),
        (["search", path, "--like", tmp_path / "no.png"], "does not exist"),
        (["search", path, "--like", files[0], "--sheet", "a.txt"], "ends with .png"),
        (["search", path, "--text", "a wren"], "has no text encoder"),
    ):
        refused = invoke(*arguments)
        assert refused.exit_code == 2
        assert words in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_tables_of_many_tokens_are_not_searched(table: Any) -> None:
    path, files, _ = table(3, what="grid")
    with pytest.raises(
        SearchError, match="holds 'grid', expected one vector for each file; embed them with --what cls"
    ):
        search(path, like=files[0])
    with pytest.raises(TableError):
        search(files[0], like=files[0])
    os.mkfifo(path.with_name("pipe"))
    for odd in ("pipe", "x" * 5000):
        with pytest.raises(TableError, match="is not a table that `omni embed` wrote"):
            search(path.with_name(odd), like=files[0])


def test_tables_that_hold_something_else_are_refused_in_a_sentence(table: Any) -> None:
    path, files, _ = table(3)
    whole = pq.read_table(path)
    document, places = json.loads(whole.schema.metadata[b"omni"]), whole.schema
    width = places.field("embedding").type.list_size
    columns: list[tuple[str, Any]] = [
        ("embedding", [[1.0], [1.0, 2.0], [1.0]]),
        ("embedding", ["x"] * 3),
        ("embedding", pa.array([[float("nan")] * width] * 3, places.field("embedding").type)),
        ("embedding", pa.array([[None] * width] * 3, places.field("embedding").type)),
        ("path", [1, 2, 3]),
        ("path", [b"\xff"] * 3),
    ]
    odd = [whole.set_column(places.get_field_index(name), name, pa.array(values)) for name, values in columns]
    odd.append(whole.drop_columns("embedding"))
    for key, value in (("what", 1), ("rows", "x"), ("dtype", None), ("checkpoint", [])):
        odd.append(whole.replace_schema_metadata({b"omni": json.dumps({**document, key: value})}))
    odd.append(whole.replace_schema_metadata({b"omni": "[" * 100_000}))
    for each in odd:
        pq.write_table(each, path)
        with pytest.raises((TableError, SearchError), match=r"; (remove it|embed|name).*\.$"):
            duplicates(path)


@pytest.mark.parametrize("name", ["plain.png", "back\\slash", "\udcff\udc80", "\\udcff", "a\\\\b\udcc3"])
def test_the_path_of_a_file_comes_back_from_the_table(name: str) -> None:
    assert original(written(name)) == name

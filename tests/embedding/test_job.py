"""Rows are what the encoder says of one picture at a time, whatever is beside it, and whenever it was interrupted."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from omni.checkpoints.seal import reseal
from omni.embedding import EngineError, TableError, describe, embed
from omni.embedding import output as output_module
from omni.loading.checkpoint import load
from omni.vision.pictures import read_picture

Make = Callable[..., Path]


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def transformers_of(folder: Path) -> Callable[[str], Any]:
    """What transformers itself makes of a picture."""
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)

    @torch.inference_mode()
    def encode(path: str) -> Any:
        return model(**processor(read_picture(path), return_tensors="pt"))

    return encode


# --- Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["cls", "grid"])
def test_rows_are_what_the_model_says_of_one_picture_at_a_time(
    what: str, save_encoder: Make, make_pictures: Make, tmp_path: Path
) -> None:
    encoder, pictures = save_encoder(), make_pictures(25)
    report = embed([pictures], encoder, tmp_path / "out.parquet", what=what, batch_size=8, threads=3)
    assert (report.rows, report.unreadable, report.computed) == (25, 0, 25)
    rows, expected = read(tmp_path / "out.parquet"), transformers_of(encoder)
    assert [row["path"] for row in rows] == sorted(str(path) for path in pictures.rglob("*.*"))
    for row in rows:
        with Image.open(row["path"]) as picture:
            assert (row["width"], row["height"]) == picture.size
        wanted = getattr(expected(row["path"]), what)[0].numpy()
        found = np.array(row["embedding"], np.float32).reshape(wanted.shape)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model", "dinov2", "vit"])
def test_encoders_of_transformers_work_in_many_threads(
    model_type: str, save_encoder: Make, make_pictures: Make, tmp_path: Path
) -> None:
    encoder = save_encoder(model_type)
    embed([make_pictures(60)], encoder, tmp_path / "out.parquet", what="grid", batch_size=4, threads=8)
    expected = transformers_of(encoder)
    for row in read(tmp_path / "out.parquet")[::7]:
        hidden = expected(row["path"]).last_hidden_state[0, -4:].numpy()
        np.testing.assert_allclose(np.array(row["embedding"], np.float32), hidden, rtol=1e-4, atol=1e-5)


def test_the_shipped_encoders(tmp_path: Path) -> None:
    model, processor = load("checkpoints/omni_tiny")
    pixels = processor(text="<image>", images=read_picture("examples/scene.png"), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        projected = model.get_image_features(pixels).pooler_output[0]
    cls = transformers_of(Path("checkpoints/vision_tiny"))("examples/scene.png").cls[0, 0]
    for what, checkpoint, wanted, off in (
        ("cls", "vision_tiny", cls, 1e-5),
        ("projected", "omni_tiny", projected, 1e-4),
    ):
        table = tmp_path / f"{what}.parquet"
        embed(["examples/*.png"], Path("checkpoints") / checkpoint, table, what=what, modality="image")
        found = next(row for row in read(tmp_path / f"{what}.parquet") if row["path"] == "examples/scene.png")
        np.testing.assert_allclose(np.array(found["embedding"], np.float32), wanted.numpy(), rtol=1e-5, atol=off)
    fingerprints = json.loads(Path("checkpoints/vision_tiny/config.json").read_text())["fingerprints"]
    assert describe(tmp_path / "cls.parquet")["fingerprints"] == fingerprints


def test_neither_threads_nor_neighbours_nor_shards_change_a_row(
    save_encoder: Make, make_pictures: Make, tmp_path: Path
) -> None:
    encoder, pictures = save_encoder(), make_pictures(70)
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        embed([pictures], encoder, tmp_path / f"{threads}.parquet", batch_size=8, threads=threads)
    assert torch.get_num_threads() == before
    whole = (tmp_path / "1.parquet").read_bytes()
    assert (tmp_path / "2.parquet").read_bytes() == (tmp_path / "7.parquet").read_bytes() == whole
    embed([pictures], encoder, tmp_path / "shards", batch_size=8, shard_rows=32)
    assert [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "shards").iterdir())] == [32, 32, 6]
    assert read(tmp_path / "shards") == read(tmp_path / "1.parquet")
    embed([pictures], encoder, tmp_path / "single.parquet", batch_size=1)
    for one, other in zip(read(tmp_path / "1.parquet"), read(tmp_path / "single.parquet"), strict=True):
        np.testing.assert_allclose(one["embedding"], other["embedding"], rtol=1e-5, atol=1e-5)


def test_what_rows_rest_on_is_written_beside_them(save_encoder: Make, make_pictures: Make, tmp_path: Path) -> None:
    encoder, pictures = save_encoder(), make_pictures(3)
    embed([pictures], encoder, tmp_path / "out.parquet", precision="bfloat16", decode="scaled", batch_size=2)
    found = describe(tmp_path / "out.parquet")
    assert json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[b"omni"]) == found
    assert {name: found[name] for name in ("checkpoint", "what", "precision", "decode", "batch_size", "rows")} == {
        "checkpoint": str(encoder),
        "what": "cls",
        "precision": "bfloat16",
        "decode": "scaled",
        "batch_size": 2,
        "rows": 3,
    }
    assert 0 < found["error"] < 5e-2
    assert {len(found[name]) for name in found if name.endswith("sha256")} == {64}


def test_progress_and_the_report_tell_the_same(save_encoder: Make, make_pictures: Make, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pictures, encoder, output = make_pictures(20), save_encoder(), tmp_path / "out.parquet"
    report = embed([pictures], encoder, output, batch_size=8, progress=lambda *now: told.append(now))
    assert told == [(0, 20), (8, 20), (16, 20), (20, 20)]
    assert report.files_per_second == pytest.approx(20 / report.seconds, abs=0.06)
    again = embed([pictures], encoder, output, batch_size=8, resume=True, progress=lambda *now: told.append(now))
    assert (again.rows, again.computed, again.files_per_second) == (20, 0, 0)
    assert told[4:] == [(20, 20)]


# --- Files that are no pictures ---------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_a_row_with_the_reason(
    save_encoder: Make, make_pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, pictures = save_encoder(), make_pictures(9)
    embed([pictures], encoder, tmp_path / "good.parquet", batch_size=4)
    monkeypatch.chdir(pictures)
    Image.new("RGB", (300, 200), "red").save("whole.jpg")
    whole = Path("whole.jpg").read_bytes()
    Path("whole.jpg").unlink()
    Path("0/cut.jpg").write_bytes(whole[: len(whole) // 2])
    Path("0/text.jpg").write_text("hello")
    Path("1/empty.png").touch()
    header = whole.index(b"\xff\xc0") + 5
    Path("1/huge.jpg").write_bytes(whole[:header] + b"\xff\xff\xff\xff" + whole[header + 4 :])
    os.symlink("nowhere", "2/gone.jpg")
    bad_name = os.fsdecode(b"2/caf\xe9\n.jpg")
    Path(bad_name).touch()
    Image.new("RGB", (1, 1)).save("2/täßt 图片.png")
    report = embed(["."], encoder, "../all.parquet", batch_size=4)
    assert (report.rows, report.unreadable) == (16, 6)
    rows = {row["path"].removeprefix("./"): row for row in read(Path("../all.parquet"))}
    reasons = {path: row["error"] for path, row in rows.items() if row["error"] is not None}
    assert {path: reason.split("'")[2][:30] for path, reason in reasons.items()} == {
        "0/cut.jpg": " cannot be decoded, expected a",
        "0/text.jpg": " is not a picture that can be ",
        "1/empty.png": " is empty, expected a JPEG, PN",
        "1/huge.jpg": " is too large, expected at mos",
        "2/gone.jpg": " does not exist in ",
        "2/caf\\udce9\n.jpg": " is empty, expected a JPEG, PN",
    }
    assert all(row["embedding"] is row["width"] is row["height"] is None for row in rows.values() if row["error"])
    assert rows["2/täßt 图片.png"]["error"] is None
    for row in read(Path("../good.parquet")):
        found = rows[os.path.relpath(row["path"])]
        np.testing.assert_allclose(found["embedding"], row["embedding"], rtol=1e-5, atol=1e-5)


def test_an_embedding_that_is_no_number_is_a_row_with_the_reason(save_encoder: Make, tmp_path: Path) -> None:
    folder, board = save_encoder(), np.indices((16, 16)).sum(0) % 2
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():  # squares of this sum are too large for float32 in a picture that is the pattern, in no other
        model.get_parameter("embeddings.patch_embeddings.weight")[0] = torch.tensor(board[:8, :8] * 2.0 - 1) * 1e18
    model.save_pretrained(folder)
    (tmp_path / "p").mkdir()
    for name, grey in (("board", board * 255), ("flat", np.zeros((16, 16)))):
        Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "p" / f"{name}.png")
    assert embed([tmp_path / "p"], folder, tmp_path / "out.parquet").unreadable == 1
    board_row, flat_row = read(tmp_path / "out.parquet")
    assert "board.png' are not finite, expected numbers; check its weights." in board_row["error"]
    assert (board_row["embedding"], board_row["width"]) == (None, 16)
    assert np.isfinite(flat_row["embedding"]).all()


def test_a_picture_of_a_size_that_the_encoder_does_not_take_is_a_row_with_the_reason(
    save_encoder: Make, tmp_path: Path
) -> None:
    (tmp_path / "p").mkdir()
    for name, size in (("a", (16, 16)), ("b", (20, 12)), ("c", (16, 16))):
        Image.new("RGB", size, "red").save(tmp_path / "p" / f"{name}.png")
    for model_type in ("omni_vision", "vit"):
        folder, output = save_encoder(model_type), tmp_path / f"{model_type}.parquet"
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "do_resize": False}))
        reseal(folder)
        assert embed([tmp_path / "p"], folder, output, what="grid").unreadable == 1
        rows = read(output)
        assert [row["error"] is None for row in rows] == [True, False, True]
        assert "expected 16 x 16 pixels, found 20 x 12" in rows[1]["error"]
        assert rows[0]["embedding"] == rows[2]["embedding"] is not None


def test_a_manifest_may_name_what_is_not_there(save_encoder: Make, make_pictures: Make, tmp_path: Path) -> None:
    pictures = make_pictures(2)
    names = ["missing.png", *sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.*"))]
    lines = [json.dumps({"image": name, "caption": "x"}) for name in names * 2]
    (pictures / "rows.jsonl").write_text("\n".join(lines))
    report = embed([pictures / "rows.jsonl"], save_encoder(), tmp_path / "out.parquet")
    assert (report.rows, report.unreadable) == (3, 1)
    assert "'does not exist" not in (row := read(tmp_path / "out.parquet")[-1])["error"]
    assert "missing.png' does not exist" in row["error"]


def test_nothing_but_bad_files_is_a_table_too(save_encoder: Make, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    report = embed([tmp_path / "*.png"], save_encoder(), tmp_path / "out.parquet", what="grid", batch_size=2)
    assert (report.rows, report.unreadable) == (3, 3)
    assert [row["embedding"] for row in read(tmp_path / "out.parquet")] == [None] * 3


# --- Decoding at a smaller size ---------------------------------------------------------------------------------------


def test_scaled_decoding_is_close_and_tells_the_whole_size(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name in ("scene.png", "scene.jpg"):
        with Image.open(f"examples/{name}") as picture:
            picture.convert("RGB").resize((1000, 700), Image.Resampling.BICUBIC).save(tmp_path / "p" / name, quality=90)
    found = {}
    for decode in ("exact", "scaled"):
        embed([tmp_path / "p"], "checkpoints/vision_tiny", tmp_path / f"{decode}.parquet", decode=decode)
        found[decode] = read(tmp_path / f"{decode}.parquet")
    (jpeg, png), (scaled_jpeg, scaled_png) = found["exact"], found["scaled"]
    assert [(row["width"], row["height"]) for row in found["scaled"]] == [(1000, 700)] * 2
    assert png == scaled_png
    one, other = np.array(jpeg["embedding"]), np.array(scaled_jpeg["embedding"])
    assert (one != other).any()
    assert np.linalg.norm(one - other) / np.linalg.norm(one) < 0.1


# --- Going on ---------------------------------------------------------------------------------------------------------


def test_only_the_same_job_is_resumed(
    save_encoder: Make, make_pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "FILE_ROWS", 8)
    encoder, pictures, output = save_encoder(), make_pictures(40), tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed([pictures], encoder, output, batch_size=4, progress=stop)
    assert len(list(output.glob("*.parquet"))) == 2

    def refusal(checkpoint: Path = encoder, resume: bool = True, **changes: Any) -> str:
        with pytest.raises(TableError) as caught:
            embed([pictures], checkpoint, output, **{"batch_size": 4, "resume": resume, **changes})
        return str(caught.value)

    assert "is unfinished; continue it with --resume" in refusal(resume=False)
    assert "was begun with fingerprints {" in refusal(save_encoder(seed=1))
    assert "with what 'cls', found 'grid' now" in refusal(what="grid")
    assert "with precision 'float32', found 'bfloat16' now" in refusal(precision="bfloat16")
    assert "with decode 'exact', found 'scaled' now" in refusal(decode="scaled")
    assert "with batch_size 4, found 8 now" in refusal(batch_size=8)
    assert "with shard_rows 8, found 20 now" in refusal(shard_rows=20)
    other = Path(shutil.copytree(encoder, tmp_path / "other"))
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1, 0.5, 0.6]}))
    reseal(other)
    assert "with preprocessing_sha256" in refusal(other)
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    reseal(other)
    assert "with architecture_sha256" in refusal(other)
    (other / "config.json").write_text(json.dumps(config))
    reseal(other)
    first = sorted(pictures.rglob("*.*"))[0]
    another = first.with_name("another.png")
    first.rename(another)
    assert "was begun with other files than those found now, or some were changed since" in refusal()
    shutil.copy2(another, first)
    assert "was begun with other files" in refusal()
    another.unlink()
    report = embed([pictures], other, output, batch_size=4, resume=True)  # as it was, in another folder
    assert (report.rows, report.computed) == (40, 24)
    embed([pictures], encoder, tmp_path / "straight", batch_size=4)
    for part in output.iterdir():
        assert part.read_bytes() == (tmp_path / "straight" / part.name).read_bytes()


def test_files_that_were_changed_are_not_mixed_with_what_they_were(
    save_encoder: Make, make_pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, pictures, output = save_encoder(), make_pictures(5), tmp_path / "out.parquet"
    monkeypatch.chdir(pictures)
    (pictures / "rows.csv").write_text("image,text\nmissing.png,x\n0/00000.jpg,y\n")
    sources = [".", "rows.csv"]
    embed(sources, encoder, output)
    assert embed(sources, encoder, output, resume=True).computed == 0
    first, before = Path("0/00000.jpg"), Path("0/00000.jpg").stat()
    whole = first.read_bytes()

    def refused() -> bool:
        with pytest.raises(TableError, match="was begun with other files than those found now, or some were changed"):
            embed(sources, encoder, output, resume=True)
        return True

    first.write_bytes(whole + b" ")  # longer, and as old as before
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert refused()
    first.write_bytes(whole)
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert refused()
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert embed(sources, encoder, output, resume=True).computed == 0
    Image.new("RGB", (9, 9)).save("missing.png")
    assert refused()
    Path("missing.png").unlink()
    shutil.copytree(pictures, tmp_path / "copy")  # the same names, files and times elsewhere
    monkeypatch.chdir(tmp_path / "copy")
    assert refused()


def test_rows_of_other_arithmetic_are_not_mixed(
    make_pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another_form: Callable[..., None]
) -> None:
    encoder, pictures = "checkpoints/vision_tiny", make_pictures(3)

    def refusal(output: Path) -> str:
        with pytest.raises(TableError) as caught:
            embed([pictures], encoder, output, precision="bfloat16", resume=True)
        return str(caught.value)

    for pays, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("omni.embedding.engine.bfloat16_pays", lambda pays=pays: pays)
        embed([pictures], encoder, tmp_path / dtype, precision="bfloat16")
        assert describe(tmp_path / dtype)["dtype"] == dtype
    assert "was begun with dtype 'bfloat16', found 'float32' now" in refusal(tmp_path / "bfloat16")
    with monkeypatch.context() as patch:
        another_form(patch)
        embed([pictures], encoder, tmp_path / "doubled", precision="bfloat16")
    assert describe(tmp_path / "doubled")["engine"] == "doubled"
    assert "was begun with engine 'doubled', found '" in refusal(tmp_path / "doubled")


def in_a_process(*arguments: Any, **settings: Any) -> int:
    """Start the job in a new process, which continues an unfinished table; its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            embed(*arguments, resume=True, threads=2, **settings)
            status = 0
        finally:
            os._exit(status)
    return child


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_killed_at_random_moments_the_table_is_the_same_to_the_last_byte(
    name: str, save_encoder: Make, make_pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "PART_ROWS", 16)
    encoder, pictures = save_encoder(), make_pictures(600)
    (pictures / "0" / "text.png").write_text("hello")
    settings = {"batch_size": 8, "shard_rows": None if "." in name else 150}
    (tmp_path / "straight").mkdir()
    straight, cut = tmp_path / "straight" / name, tmp_path / name
    started = time.monotonic()
    assert os.waitpid(in_a_process([pictures], encoder, straight, **settings), 0)[1] == 0
    duration = time.monotonic() - started
    moments, kills = random.Random(3), 0
    for _ in range(100):
        child = in_a_process([pictures], encoder, cut, **settings)
        time.sleep(moments.uniform(duration / 8, duration / 2))
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            break
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            break
        kills += 1
    else:
        pytest.fail("100 attempts and no end")
    assert kills > 1

    def files(path: Path) -> list[bytes]:
        return [part.read_bytes() for part in (sorted(path.iterdir()) if path.is_dir() else [path])]

    assert files(cut) == files(straight)
    assert len(files(cut)) == (1 if "." in name else 5)
    assert len(read(cut)) == 601
    assert not list(tmp_path.rglob("*.parts"))


# --- Memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from omni.embedding import embed
embed(sys.argv[1:2], sys.argv[2], sys.argv[3], threads=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "linux" else 1024**2))
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_files(save_encoder: Make, make_pictures: Make, tmp_path: Path) -> None:
    encoder, first = save_encoder(), make_pictures(300, "few")
    shutil.copytree(first, tmp_path / "many")
    for copy in range(1, 10):
        shutil.copytree(first, tmp_path / "many" / f"copy {copy}")

    def peak(name: str) -> int:
        command = [sys.executable, "-c", PEAK, tmp_path / name, encoder, tmp_path / f"{name}.parquet"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=True)
        return int(done.stdout)

    few, many = peak("few"), peak("many")
    assert len(read(tmp_path / "many.parquet")) == 3000
    assert many - few < 25, (few, many)


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def test_what_an_encoder_does_not_have_is_told_before_anything_is_written(
    save_encoder: Make, make_pictures: Make, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="no 'projected'"):
        embed([make_pictures(2)], save_encoder(), tmp_path / "out.parquet", what="projected")
    with pytest.raises(TableError, match="names one file; for files of 10 rows name a folder"):
        embed([tmp_path / "pictures"], save_encoder(), tmp_path / "out.parquet", shard_rows=10)
    assert not list(tmp_path.glob("out*"))

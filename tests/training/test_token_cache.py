"""The token cache: the encoder's own tokens, never an old or a damaged entry, bounded, shared by processes."""

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omni import OmniImageProcessor, OmniVisionConfig, OmniVisionModel
from omni.training import cache as module
from omni.training.cache import FrozenTower, TokenCache
from omni.vision.pictures import PictureError

ENTRY = 4 * (1 + 4) * 24  # bytes of the tokens of one picture: CLS and 2 x 2 patches of width 24, float32


def frozen(model: OmniVisionModel, processor: OmniImageProcessor) -> FrozenTower:
    return FrozenTower("image", {"encoder": model.config, "output": "cls+grid"}, model, processor)


def make_encoder(seed: int = 0, **processing: object) -> FrozenTower:
    torch.manual_seed(seed)
    model = OmniVisionModel(
        OmniVisionConfig(image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    return frozen(model, OmniImageProcessor(size={"height": 16, "width": 16}, **processing))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def expected(encoder: FrozenTower, path: Path) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = encoder.tower(**encoder.preprocessor(Image.open(path), return_tensors="pt"))
    return {"cls": output.cls[0].numpy(), "grid": output.grid[0].numpy()}


def check(cache: TokenCache, encoder: FrozenTower, path: Path) -> None:
    item, wanted = cache.encode(path), expected(encoder, path)
    assert item.grid_shape == (2, 2)
    assert item.tokens.keys() == wanted.keys()
    for name, tokens in wanted.items():
        np.testing.assert_allclose(item.tokens[name], tokens, rtol=1e-5, atol=1e-6)


def test_an_entry_is_what_the_encoder_says_to_the_last_bit(tmp_path: Path, files: list[Path]) -> None:
    encoder = make_encoder()
    cache = TokenCache(tmp_path / "cache", encoder)
    first = [cache.encode(path) for path in files]
    for path in files:
        check(cache, encoder, path)
    again = [TokenCache(tmp_path / "cache", encoder).encode(path) for path in files]
    for one, other in zip(first, again, strict=True):
        assert all(one.tokens[name].tobytes() == other.tokens[name].tobytes() for name in one.tokens)
    assert (cache.hits, cache.misses) == (12, 12)


def test_content_counts_and_not_the_name(tmp_path: Path, files: list[Path]) -> None:
    encoder = make_encoder()
    cache = TokenCache(tmp_path / "cache", encoder)
    cache.encode(files[0])
    shutil.copy(files[0], tmp_path / "another name")
    check(cache, encoder, tmp_path / "another name")
    assert (cache.hits, cache.misses) == (1, 1)
    before = files[0].stat()
    files[0].write_bytes(files[1].read_bytes())
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # as old as before, and maybe as long
    check(cache, encoder, files[0])
    assert cache.misses == 2


def test_no_change_is_served_from_old_entries(tmp_path: Path, files: list[Path]) -> None:
    changed = make_encoder()
    with torch.no_grad():
        changed.tower.layers[1].mlp.fc2.bias[3] += 1e-3
    encoders = [make_encoder(), make_encoder(1), changed, make_encoder(do_normalize=False), make_encoder(resample=0)]
    deeper = OmniVisionConfig.from_dict({**encoders[0].tower.config.to_dict(), "layer_norm_eps": 0.1})
    model = OmniVisionModel(deeper).eval()
    model.load_state_dict(encoders[0].tower.state_dict())
    encoders.append(frozen(model, encoders[0].preprocessor))
    for encoder in encoders * 2:
        check(TokenCache(tmp_path / "cache", encoder), encoder, files[0])
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == len(encoders)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "zeros"])
def test_damaged_entries_are_made_again(tmp_path: Path, files: list[Path], damage: str) -> None:
    encoder = make_encoder()
    cache = TokenCache(tmp_path / "cache", encoder)
    cache.encode(files[0])
    (entry,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    whole = entry.read_bytes()
    flipped = bytes([*whole[:200], whole[200] ^ 1, *whole[201:]])
    damaged = {"flip": flipped, "cut": whole[:-9], "empty": b"", "longer": whole + b"x", "zeros": bytes(4)}
    entry.write_bytes(damaged[damage])
    check(cache, encoder, files[0])
    assert (cache.hits, cache.misses) == (0, 2)
    assert entry.read_bytes() == whole


def test_the_folder_stays_within_its_bound_and_keeps_what_is_used(tmp_path: Path, files: list[Path]) -> None:
    encoder = make_encoder()
    limit = 5 * (ENTRY + 300)
    cache = TokenCache(tmp_path / "cache", encoder, max_bytes=limit)
    for path in files:
        cache.encode(path)
        cache.encode(files[0])
        entries = [each.stat().st_size for each in (tmp_path / "cache").rglob("*") if each.is_file()]
        assert sum(entries) <= limit * 1.1 + max(entries)
    assert 3 <= len(entries) <= 6
    assert cache.hits == len(files)  # the first one was used all the time, so it never left
    for path in files:
        check(cache, encoder, path)


def test_several_that_write_keep_the_bound_that_is_promised(tmp_path: Path, files: list[Path]) -> None:
    encoders = [make_encoder(seed) for seed in range(3)]  # no entry of one is of use to another
    size = 10 * (ENTRY + 300)
    caches = [TokenCache(tmp_path / "cache", encoder, max_bytes=size) for encoder in encoders]
    for path in files:
        for cache in caches:
            cache.encode(path)
            entries = [each.stat().st_size for each in (tmp_path / "cache").rglob("*") if each.is_file()]
            assert sum(entries) <= size * 1.3 + 3 * max(entries)
    TokenCache(tmp_path / "cache", encoders[0], max_bytes=size)
    assert sum(each.stat().st_size for each in (tmp_path / "cache").rglob("*") if each.is_file()) <= size


def test_files_of_others_stay(tmp_path: Path, files: list[Path]) -> None:
    cache = tmp_path / "cache"
    strange = [
        "ab/notes.txt",
        "zz/" + "0" * 62,
        "ab/" + "0" * 61,
        "abc/" + "0" * 62,
        "0" * 62,
        "ab/unfinished",
        "AB/x.png",
    ]
    own = ["ab/" + "0" * 62, "00/unfinished-a8b_c3d9"]
    for name in (*strange, *own):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("mine")
    kept = TokenCache(cache, make_encoder(), max_bytes=1)
    kept.encode(files[0])
    assert {str(each.relative_to(cache)) for each in cache.rglob("*") if each.is_file()} == {*strange}


def test_a_picture_that_is_replaced_meanwhile_is_not_kept_as_the_one_before(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, before, read = TokenCache(tmp_path / "cache", make_encoder()), files[0].read_bytes(), module._read

    def replaced(entry: Path) -> object:
        """Looking for an entry comes after hashing and before decoding."""
        files[0].write_bytes(files[1].read_bytes())
        return read(entry)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", replaced)
        cache.encode(files[0])
    check(cache, cache.tower, files[0])
    files[0].write_bytes(before)
    check(cache, cache.tower, files[0])


def test_pictures_that_cannot_be_read_are_refused_and_not_kept(tmp_path: Path, files: list[Path]) -> None:
    cache = TokenCache(tmp_path / "cache", make_encoder())
    files[0].write_bytes(files[0].read_bytes()[:300])
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (files[0], "expected a whole PNG"),
        (tmp_path / "no", "does not exist"),
        (tmp_path / "pipe", "pipe"),
    ):
        with pytest.raises(PictureError, match=words) as caught:
            cache.encode(path)
        assert repr(str(path)) in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def use(folder: Path, files: list[Path], seed: int) -> None:
    """Much writing, reading and removing in little room."""
    torch.set_num_threads(1)
    cache = TokenCache(folder, make_encoder(), max_bytes=4 * (ENTRY + 300))
    for place in np.random.default_rng(seed).integers(0, len(files), 150):
        check(cache, cache.tower, files[place])


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path: Path, files: list[Path]) -> None:
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=use, args=(tmp_path / "cache", files, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list((tmp_path / "cache").rglob("unfinished-*"))

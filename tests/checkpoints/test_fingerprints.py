"""What is known of a checkpoint's weights: hashes that anything changes, of files that are read without their library."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from omni import OmniForConditionalGeneration, OmniVisionModel
from omni.checkpoints import fingerprints
from omni.checkpoints.fingerprints import (
    SAFETENSORS_TYPES,
    fingerprint_folder,
    fingerprint_parts,
    map_tensors,
    part_of,
    read_tensors,
)

Tensors = dict[str, torch.Tensor]


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A safetensors file with a tensor of each type, one of no dimensions and one that is empty."""
    tensors = {str(dtype): torch.tensor([[1, 0, 3], [4, 5, 6]]).to(dtype) for dtype in SAFETENSORS_TYPES.values()}
    tensors |= {"number": torch.tensor(2.5), "empty": torch.empty(0, 3), '\u00e4 "quoted"': torch.ones(1)}
    save_file(tensors, path := tmp_path / "model.safetensors", {"format": "pt", "who": "omni"})
    return path


def test_a_mapped_file_holds_what_its_library_reads(file: Path) -> None:
    expected, found = load_file(file), {name: entry.tensor() for name, entry in map_tensors(file).items()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert tensor.equal(expected[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "saved alone, it would take its neighbours along"


def test_what_is_written_into_a_mapped_tensor_does_not_reach_the_file(file: Path) -> None:
    content, name = file.read_bytes(), str(torch.float32)
    tensor = map_tensors(file)[name].tensor()
    tensor.mul_(2)
    assert tensor.equal(2 * load_file(file)[name])
    assert map_tensors(file)[name].tensor().equal(load_file(file)[name])
    assert file.read_bytes() == content


def test_a_file_that_is_not_whole(file: Path) -> None:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])

    def refused(data: bytes) -> None:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"is not a whole safetensors file|empty file"):
            map_tensors(file)

    for length in (*range(20), start - 1, start, start + 1, len(content) // 2, len(content) - 1):
        refused(content[:length])
    for changed in (
        [header],
        "text",
        {**header, "number": [1, 2]},
        {**header, "number": {"dtype": "F32", "shape": []}},
        *(
            {**header, "number": {**header["number"], key: value}}
            for key, values in {
                "data_offsets": ([0, 3], [0, 8], [-4, 0], [10**9, 10**9 + 4], [4, 0], [0], 4, "ab", ["a", "b"]),
                "shape": ([2], [-1], [-1, -1], [1.0], ["a"], None),
                "dtype": ("F16", "F64", ["F32"], {}),
            }.items()
            for value in values
        ),
    ):
        text = json.dumps(changed).encode()
        refused(len(text).to_bytes(8, "little") + text + content[start:])


# --- Fingerprints -----------------------------------------------------------------------------------------------------


def test_parts() -> None:
    assert part_of("model.image_tower.norm.weight") == part_of("image_tower.norm.weight") == "image_tower"
    assert part_of("model.language_model.layers.0.mlp.up_proj.weight") == "language_model"
    assert part_of("lm_head.weight") == "lm_head"
    assert part_of("layers.0.norm1.weight") == part_of("norm.weight") == "encoder"


def test_a_tower_has_the_fingerprint_of_the_encoder_alone(encoder: Any) -> None:
    tensors = encoder.state_dict()
    tower = fingerprint_parts({f"model.image_tower.{name}": tensor for name, tensor in tensors.items()})
    assert list(fingerprint_parts(tensors).values()) == list(tower.values())


def test_anything_changes_the_fingerprint() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2, 2), "empty": torch.zeros(0)}
    (mark,) = fingerprint_parts(tensors).values()
    changes: list[Tensors] = [
        {**tensors, "a": torch.arange(4.0).nextafter(torch.tensor(9.0))},
        {**tensors, "a": torch.arange(4.0).bfloat16()},
        {**tensors, "b": torch.zeros(4)},
        {**tensors, "b": -torch.zeros(2, 2)},
        {"a": tensors["a"], "c": tensors["b"], "empty": tensors["empty"]},
        {key: tensors[key] for key in ("a", "b")},
    ]
    marks = [next(iter(fingerprint_parts(change).values())) for change in changes]
    assert len({mark, *marks}) == len(changes) + 1
    assert list(fingerprint_parts({key: tensors[key] for key in reversed(tensors)}).values()) == [mark]
    assert list(fingerprint_parts({**tensors, "a": torch.arange(8.0)[::2] / 2}).values()) == [mark]  # not contiguous


def test_the_configuration_of_the_file_knows_its_weights(saved: dict[str, Path]) -> None:
    for folder in saved.values():
        config = AutoConfig.from_pretrained(folder)
        assert config.fingerprints == fingerprint_parts(read_tensors(folder)) == fingerprint_folder(folder)


@pytest.mark.parametrize("at_once", [1, 7, 2**20])
def test_a_fingerprint_is_one_hash_over_names_types_shapes_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Written down here once more, in one file and in shards, of any type, gathered in pieces of any size."""
    monkeypatch.setattr(fingerprints._Digests, "AT_ONCE", at_once)
    types = [*SAFETENSORS_TYPES.values(), torch.complex64]  # the last one is in no list
    tensors = {f"model.image_tower.{n}.weight": torch.ones(2, n).to(dtype) for n, dtype in enumerate(types)}
    tensors |= {"lm_head.weight": torch.arange(5.0), "model.language_model.scale": torch.tensor(3.0)}
    expected = {}
    for part in ("image_tower", "language_model", "lm_head"):
        digest = hashlib.sha256()
        for name in sorted(name for name in tensors if part in name):
            tensor, inner = tensors[name], name.split(f"{part}.")[1]
            digest.update(f"{inner} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(bytes(tensor.flatten().view(torch.uint8).tolist()))
        expected[part] = digest.hexdigest()[:32]
    assert fingerprint_parts(tensors) == expected
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert fingerprint_folder(tmp_path) == expected
    known = {name: tensor for name, tensor in tensors.items() if tensor.dtype != torch.complex64}
    halves = {f"model-{n}.safetensors": dict(list(known.items())[n::2]) for n in range(2)}
    (tmp_path / "model.safetensors").unlink()
    for file, half in halves.items():
        save_file(half, tmp_path / file)
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint_folder(tmp_path) == fingerprint_parts(known) != expected


# --- Checksums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_checksums_are_those_of_the_files(kind: str, saved: dict[str, Path]) -> None:
    for name in ("fused", "encoder"):
        folder = saved[f"{name}-{kind}"]
        files = [*folder.glob("*.safetensors")]
        assert (len(files) > 1) == (kind == "shards")
        expected = {file.name: f"{zlib.crc32(file.read_bytes()):08x}" for file in files}
        assert json.loads((folder / "config.json").read_text())["checksums"] == expected
        assert AutoConfig.from_pretrained(folder).checksums == expected


def test_what_is_as_it_was_written_is_not_hashed_again(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    hash_it = fingerprints.fingerprint_folder
    monkeypatch.setattr(fingerprints, "fingerprint_folder", lambda *of: hashed.append(of[0]) or hash_it(*of))
    for name in ("fused-file", "fused-shards"):
        OmniForConditionalGeneration.from_pretrained(saved[name])
    assert hashed == []
    shutil.copytree(saved["encoder-file"], tmp_path, dirs_exist_ok=True)  # as another tool writes the same tensors
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt", "by": "it"})
    OmniVisionModel.from_pretrained(tmp_path)
    assert hashed == [tmp_path]


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_variant_has_its_own_files(size: str, encoder: Any, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path, variant="ema", max_shard_size=size)
    files = {path.name: f"{zlib.crc32(path.read_bytes()):08x}" for path in tmp_path.glob("*.safetensors")}
    assert (len(files) > 1) == (size == "20KB")
    assert all(".ema" in name for name in files)
    assert AutoConfig.from_pretrained(tmp_path).checksums == files
    found = OmniVisionModel.from_pretrained(tmp_path, variant="ema")
    assert found.state_dict()["norm.weight"].equal(encoder.state_dict()["norm.weight"])
    name = sorted(files)[0]
    damaged = bytearray((tmp_path / name).read_bytes())
    damaged[-3] ^= 1
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ValueError, match="the weights of encoder are not those"):
        OmniVisionModel.from_pretrained(tmp_path, variant="ema")


def test_a_folder_without_checksums_is_hashed(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["encoder-file"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["checksums"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the weights of encoder are not those"):
        OmniVisionModel.from_pretrained(tmp_path)


def test_a_fused_model_has_no_checksums_of_its_encoders_folder(
    make_model: Callable[..., Any], encoder: Any, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path / "encoder")
    model = make_model()
    model.config.image_config.checksums = AutoConfig.from_pretrained(tmp_path / "encoder").checksums
    model.save_pretrained(tmp_path / "fused")
    assert (tmp_path / "fused/config.json").read_text().count("checksums") == 1

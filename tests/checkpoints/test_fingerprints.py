"""What is known of a checkpoint's weights: hashes that anything changes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from omni import OmniVisionModel
from omni.checkpoints.fingerprints import fingerprint_parts, part_of, read_tensors

Tensors = dict[str, torch.Tensor]


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
        assert config.fingerprints == fingerprint_parts(read_tensors(folder))


TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
TYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("files", [1, 2])
def test_a_fingerprint_is_one_hash_over_names_types_shapes_and_values(files: int, tmp_path: Path) -> None:
    """Written down here once more, in one file and in shards, of any type."""
    tensors = {f"model.image_tower.{n}.weight": torch.ones(2, n).to(dtype) for n, dtype in enumerate(TYPES)}
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
    shards = {f"model-{n}.safetensors": dict(list(tensors.items())[n::files]) for n in range(files)}
    for file, shard in shards.items():
        save_file(shard, tmp_path / file)
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint_parts(read_tensors(tmp_path)) == expected


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_variant_has_its_own_files(size: str, encoder: Any, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path, variant="ema", max_shard_size=size)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "20KB")
    assert all(".ema" in name for name in files)
    found = OmniVisionModel.from_pretrained(tmp_path, variant="ema")
    assert found.state_dict()["norm.weight"].equal(encoder.state_dict()["norm.weight"])
    damaged = bytearray((tmp_path / files[0]).read_bytes())
    damaged[-3] ^= 1
    (tmp_path / files[0]).write_bytes(damaged)
    with pytest.raises(ValueError, match="The weights of encoder in "):
        OmniVisionModel.from_pretrained(tmp_path, variant="ema")


def test_a_fused_model_has_one_fingerprint_of_each_part(
    make_model: Callable[..., Any], encoder: Any, tmp_path: Path
) -> None:
    """Not also that of the folder which its encoder came from: the encoder may have learnt since."""
    encoder.save_pretrained(tmp_path / "encoder")
    model = make_model()
    model.config.image_config.fingerprints = AutoConfig.from_pretrained(tmp_path / "encoder").fingerprints
    model.save_pretrained(tmp_path / "fused")
    config = json.loads((tmp_path / "fused/config.json").read_text())
    assert list(config["fingerprints"]) == ["image_projector", "image_tower", "language_model", "lm_head"]
    assert "fingerprints" not in config["image_config"]

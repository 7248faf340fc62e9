"""A folder from anywhere, with any content, is opened soon, or refused in one sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omni import OmniForConditionalGeneration, OmniProcessor, OmniVisionModel
from omni.checkpoints.folder import CheckpointError, expect_answers, expect_model, model_type_of, read_object
from omni.loading.checkpoint import load
from omni.loading.encoder import load_encoder

SHIPPED = Path("checkpoints/omni_tiny")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Of the shipped model, without seals: as somebody's own tools may have written it."""
    folder = Path(shutil.copytree(SHIPPED, tmp_path / "copy"))
    for seal in folder.glob("*seal.json"):
        seal.unlink()
    return folder


def refusal(call: Any, *arguments: Any) -> str:
    """What is said by a `CheckpointError`, in one line."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to nothing"])
def test_pipes_are_not_waited_for(copy: Path, name: str, kind: str) -> None:
    (copy / name).unlink()
    if kind == "pipe":
        os.mkfifo(copy / name)
    else:
        (copy / name).symlink_to("/dev/zero" if kind == "device" else "nowhere")
    for opened in (load, OmniForConditionalGeneration.from_pretrained, OmniProcessor.from_pretrained):
        assert f"{name!r} is a pipe, a device or a link to nothing" in refusal(opened, copy)


def test_links_to_files_are_files(copy: Path, tmp_path: Path) -> None:
    """As the cache of the hub has them."""
    (copy / "model.safetensors").rename(tmp_path / "blob")
    (copy / "model.safetensors").symlink_to(tmp_path / "blob")
    load(copy)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"3", b"\xff\xfe", b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"],
    ids=["empty", "cut", "list", "number", "bytes", "nested", "long number"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "processor_config.json"])
def test_invalid_json_is_refused(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    assert name in refusal(load, copy)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "x\0y", "\ud800", "nowhere"])
def test_paths_without_a_folder_are_refused(name: str) -> None:
    for call in (load, model_type_of, expect_answers):
        assert len(refusal(call, Path(name))) < 600
    assert "model.safetensors' is a file" in refusal(model_type_of, SHIPPED / "model.safetensors")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(model_type_of, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "names no model_type" in refusal(model_type_of, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert model_type_of(tmp_path) == "vit"
    assert "of type 'vit'; name the folder of one of type 'omni' or 'clip'" in refusal(
        expect_model, tmp_path, "omni", "clip"
    )


# --- Configurations ---------------------------------------------------------------------------------------------------

SHAPES: list[tuple[str, Any]] = [
    *(
        ("modalities", value)
        for value in (3, -0.5, "image", [], [{}], True, {"image": 3}, {"image": []}, {"image": None})
    ),
    *(("modalities.image", value) for value in ({}, {"token_id": "4"}, {"factor": 0})),
    *(("modalities.image.token_id", value) for value in (None, -1.5, [4])),
    *(("modalities.image.factor", value) for value in (-2, 10**20, 1.5)),
    *(("image_config", value) for value in (7, "x", [])),
    *(("image_config.hidden_size", value) for value in (-128, 0, 10**9, 10**20, "128", 128.0, None)),
    *(("image_config.num_hidden_layers", value) for value in (-1, 10**9, 10**20, 1e300)),
    *(("image_config.num_channels", value) for value in (-3, 10**9)),
    ("image_config.image_size", 16 * 10**8),
    *(("text_config", value) for value in (1, None, [], {}, {"model_type": 3}, {"model_type": "t5"})),
    *(("text_config.vocab_size", value) for value in (-965, 10**11, 10**20)),
    *(("text_config.num_hidden_layers", value) for value in (-6, 10**9, "6")),
    *(("text_config.intermediate_size", value) for value in (-768, 10**12)),
    *(("text_config.layer_types", value) for value in (3, ["x"] * 6, [[]])),
    *(("model_type", value) for value in (None, 3, [], "gpt2", "\ud800")),
    *(("untrained", value) for value in ("x", {"image_projector": 1}, ["image_projector"], 3)),
    *(("fingerprints", value) for value in ("x", [], {"image_tower": 3}, {"image_tower": "0" * 32})),
]


@pytest.fixture(scope="module")
def unsealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unsealed")
    shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
    for seal in folder.glob("*seal.json"):
        seal.unlink()
    return folder


@pytest.mark.parametrize(("key", "value"), SHAPES, ids=lambda value: str(value)[:40])
def test_configurations_that_describe_no_model(unsealed: Path, key: str, value: Any) -> None:
    """Said before anything is built or any memory is taken; what is wrong is in the sentence."""
    before = (unsealed / "config.json").read_text()
    values = inner = json.loads(before)
    *sections, last = key.split(".")
    for section in sections:
        inner = inner[section]
    inner[last] = value
    (unsealed / "config.json").write_text(json.dumps(values))
    try:
        with pytest.raises(CheckpointError) as caught:
            load(unsealed)
        assert "allocate" not in str(caught.value)
        assert str(unsealed) in str(caught.value)
    finally:
        (unsealed / "config.json").write_text(before)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("vocab_size", 10**10, "describes a model with 2,5"),
        ("num_hidden_layers", 10**9, "'text_config.num_hidden_layers'; expected at most 10,000"),
    ],
)
def test_a_configuration_that_is_far_too_large_is_refused_by_every_class(
    unsealed: Path, key: str, value: int, said: str
) -> None:
    before = (unsealed / "config.json").read_text()
    values = json.loads(before)
    values["text_config"][key] = value
    (unsealed / "config.json").write_text(json.dumps(values))
    try:
        assert said in refusal(OmniForConditionalGeneration.from_pretrained, unsealed)
        if key == "num_hidden_layers":
            assert said in refusal(OmniVisionModel.from_pretrained, unsealed)
    finally:
        (unsealed / "config.json").write_text(before)


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("config.json", "image_size", 10**20, "'image_size'; expected a number of at most 64 bits"),
        ("config.json", "auto_map", 3, "cannot be loaded as an encoder: TypeError"),
        ("config.json", "hidden_act", "none", "cannot be loaded as an encoder: KeyError"),
        (
            "preprocessor_config.json",
            "size",
            {"height": 10**9, "width": 224},
            "'size.height'; expected at most 100,000",
        ),
        (
            "preprocessor_config.json",
            "size",
            {"height": "x", "width": 224},
            "cannot be loaded as an encoder: TypeError",
        ),
        ("preprocessor_config.json", "image_mean", "x", "cannot be loaded as an encoder"),
    ],
)
def test_invalid_encoders_are_refused(file: str, key: str, value: Any, said: str, tmp_path: Path) -> None:
    shutil.copytree("checkpoints/vision_tiny", tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**values, key: value}))
    assert f"{file} is damaged or changed" in refusal(load_encoder, tmp_path)
    for seal in tmp_path.glob("*seal.json"):
        seal.unlink()
    assert said in refusal(load_encoder, tmp_path)


def test_an_index_that_names_no_files(unsealed: Path, tmp_path: Path) -> None:
    for shards in (3, {"a": 3}, {"a": "../elsewhere.safetensors"}, ["a"]):
        shutil.copytree(unsealed, tmp_path, dirs_exist_ok=True)
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards, "metadata": {}}))
        assert "model.safetensors.index.json" in refusal(load, tmp_path)


# --- Before anything heavy --------------------------------------------------------------------------------------------

ASK = """
import sys
from omni.cli.app import app
try:
    app(["ask", "examples/scene.png", "what is it", "--checkpoint", sys.argv[1]])
except SystemExit as end:
    print(end.code, "torch" in sys.modules, "transformers" in sys.modules)
"""


@pytest.mark.parametrize("what", ["untrained", "another model", "no model"])
def test_what_cannot_answer_is_refused_before_torch_is_imported(copy: Path, what: str) -> None:
    values = json.loads((copy / "config.json").read_text())
    values |= {"untrained": ["image_projector"]} if what == "untrained" else {"model_type": "omni_vision"}
    (copy / "config.json").write_text(json.dumps(values))
    if what == "no model":
        (copy / "config.json").unlink()
    done = subprocess.run([sys.executable, "-c", ASK, copy], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False", "False"]
    expected = {"untrained": "is untrained", "another model": "does not answer", "no model": "has no config.json"}
    assert expected[what] in done.stderr
    assert done.stderr.count("\n") == 1


def test_adapters_count_as_what_they_trained(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "adapters").mkdir()
    config = {"model_type": "omni", "untrained": ["image_projector", "lm_head"]}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    adapters = {"base_model_name_or_path": str(tmp_path / "base"), "modules_to_save": ["image_projector"]}
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(adapters))
    assert "lm_head is untrained" in refusal(expect_answers, tmp_path / "adapters")
    adapters["modules_to_save"] = ["image_projector", "lm_head"]
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(adapters))
    expect_answers(tmp_path / "adapters")
    (tmp_path / "adapters/adapter_config.json").write_text('{"base_model_name_or_path": "' + "x" * 5000 + '"}')
    assert "which is not there" in refusal(expect_answers, tmp_path / "adapters")


def test_an_object_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, "\\ud800", 1e400]}')
    assert read_object(tmp_path / "a.json") == {"a": [1, "\ud800", float("inf")]}

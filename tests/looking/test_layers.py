"""The walk through the encoder against numbers derived by hand from its sizes."""

import io
import json
import math

import pytest
from rich.console import Console
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    LlamaConfig,
    PreTrainedConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from omni.looking.layers import Inspection, inspect_encoder, render
from omni.looking.steps import Step
from omni.vision.configuration_vision import OmniVisionConfig
from omni.vision.modeling_vision import OmniVisionModel

TINY = "configs/vision_tiny.json"
SMALL = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip


def by_name(inspection: Inspection) -> dict[str, Step]:
    """Rows by the path of their names: "block 1/attention/qkv"."""
    found, path = {}, []
    for row in inspection.rows:
        path = [*path[: row.depth], row.name]
        found["/".join(path)] = row
    assert len(found) == len(inspection.rows)
    return found


def assert_consistent(inspection: Inspection) -> None:
    """Rows of depth 0 add up to the totals, and no part is larger than the whole."""
    for what in ("parameters", "flops", "activation_bytes"):
        numbers = [(row.depth, getattr(row, what)) for row in inspection.rows]
        assert sum(number for depth, number in numbers if depth == 0) == getattr(inspection, what)
        wholes: list[int] = []  # what is left of each enclosing row
        for depth, number in numbers:
            wholes = wholes[:depth]
            if wholes:
                wholes[-1] -= number
                assert wholes[-1] >= 0
            wholes.append(number)


class TestSeed:
    def test_steps(self) -> None:
        block = ["norm1", "attention", "attention/qkv", "attention/scores", "attention/o_proj", "norm2"]
        block += ["mlp", "mlp/fc1", "mlp/activation", "mlp/fc2"]
        expected = ["patch embedding", "sequence", "CLS in front", "plus positions"]
        for i in range(1, 5):
            expected += [f"block {i}", *(f"block {i}/{part}" for part in block)]
        assert list(by_name(inspect_encoder(TINY))) == [*expected, "RMSNorm", "cls", "grid"]

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize(("height", "width"), [(224, 224), (448, 448), (160, 320)])
    def test_numbers(self, height, width, batch) -> None:
        inspection = inspect_encoder(TINY, (height, width), batch)
        rows, columns, d, ff, heads = height // 16, width // 16, 128, 512, 2
        n = rows * columns + 1
        linear = {"attention/qkv": (d, 3 * d), "attention/o_proj": (d, d), "mlp/fc1": (d, ff), "mlp/fc2": (ff, d)}
        block = {name: ((batch, n, o), i * o + o, 2 * batch * n * i * o) for name, (i, o) in linear.items()}
        block["norm1"] = block["norm2"] = ((batch, n, d), 2 * d, 0)
        block["mlp/activation"] = ((batch, n, ff), 0, 0)
        block["attention/scores"] = ((batch, heads, n, n), 0, 2 * 2 * batch * n * n * d)
        expected = {
            "patch embedding": ((batch, d, rows, columns), 3 * 256 * d + d, 2 * batch * (n - 1) * 3 * 256 * d),
            "sequence": ((batch, n - 1, d), 0, 0),
            "CLS in front": ((batch, n, d), d, 0),
            "plus positions": ((batch, n, d), 197 * d, 0),
            **{f"block {i}/{name}": numbers for i in range(1, 5) for name, numbers in block.items()},
            "RMSNorm": ((batch, n, d), d, 0),
            "cls": ((batch, 1, d), 0, 0),
            "grid": ((batch, n - 1, d), 0, 0),
        }
        found = by_name(inspection)
        for name, (shape, parameters, flops) in expected.items():
            row = found.pop(name)
            assert (row.shape, row.parameters, row.flops) == (shape, parameters, flops), name
            view = name in ("sequence", "cls", "grid")
            assert row.activation_bytes == (0 if view else 4 * math.prod(shape)), name
        assert {name.split("/")[-1] for name in found} == {f"block {i}" for i in range(1, 5)} | {"attention", "mlp"}
        assert inspection.flops == sum(flops for _, _, flops in expected.values())
        assert inspection.parameters == 916_992 == sum(parameters for _, parameters, _ in expected.values())
        assert inspection.activation_bytes == sum(
            row.activation_bytes for row in by_name(inspection).values() if not row.depth
        )
        assert (inspection.model, inspection.image_size, inspection.batch_size) == (
            "OmniVisionModel",
            (height, width),
            batch,
        )
        assert_consistent(inspection)

    def test_totals_of_one_picture(self) -> None:
        inspection = inspect_encoder(TINY)
        rows = by_name(inspection)
        assert inspection.parameters == 916_992
        assert rows["block 1"].parameters == 198_272
        assert inspection.flops == 427_870_208  # 0.428 GFLOP, a multiply-add being two
        assert rows["patch embedding"].flops == 38_535_168
        assert rows["block 1"].flops == 97_333_760
        assert rows["block 1/attention/scores"].flops == 19_870_208
        assert rows["block 1/attention"].flops + rows["block 1/mlp"].flops == rows["block 1"].flops
        assert inspection.activation_bytes == 7_696_672

    def test_parameters_are_those_of_the_model(self) -> None:
        config = OmniVisionConfig(img_size=32, patch=8, d_model=24, n_layers=3, n_heads=3, d_ff=40)
        inspection = inspect_encoder(config)
        modules = dict(OmniVisionModel(config).named_modules())
        for row in inspection.rows:
            if row.module is not None:
                assert row.parameters == sum(p.numel() for p in modules[row.module].parameters()), row.module
        assert inspection.parameters == OmniVisionModel(config).num_parameters()


class TestSources:
    def test_folder_file_and_configuration(self, tmp_path) -> None:
        config = OmniVisionConfig(**SMALL)
        expected = inspect_encoder(config)
        config.save_pretrained(tmp_path)
        assert inspect_encoder(tmp_path) == expected
        assert inspect_encoder(str(tmp_path / "config.json")) == expected
        seed = {"img_size": 32, "patch": 8, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64}
        (tmp_path / "seed.json").write_text(json.dumps(seed))
        assert inspect_encoder(tmp_path / "seed.json") == expected

    def test_configuration_stays_as_it_was(self) -> None:
        config = OmniVisionConfig(**SMALL, attn_implementation="sdpa")
        inspect_encoder(config)
        assert config._attn_implementation == "sdpa"

    @pytest.mark.parametrize(
        "config_class", [ViTConfig, CLIPVisionConfig, SiglipVisionConfig, Dinov2WithRegistersConfig]
    )
    def test_other_towers(self, config_class: type[PreTrainedConfig], tmp_path) -> None:
        config = config_class(**SMALL)
        inspection = inspect_encoder(config, batch_size=2)
        assert_consistent(inspection)
        assert inspection.parameters == AutoModel.from_config(config).num_parameters()
        rows = by_name(inspection)
        blocks = [name for name in rows if name.endswith(("layers.0", "layer.0"))]
        assert len(blocks) == 1
        (scores,) = (row for name, row in rows.items() if name.startswith(blocks[0]) and row.name == "scores")
        assert scores.shape[:2] == (2, 2)
        assert scores.flops == 2 * 2 * 2 * scores.shape[-1] ** 2 * 32
        config.save_pretrained(tmp_path)
        assert inspect_encoder(tmp_path, batch_size=2) == inspection
        larger = inspect_encoder(config, image_size=64, batch_size=2)  # four times as many patches
        assert larger.parameters == inspection.parameters
        assert larger.flops > 4 * inspection.flops

    def test_tower_of_a_larger_model(self) -> None:
        config = CLIPConfig(vision_config=SMALL)
        assert inspect_encoder(config) == inspect_encoder(config.vision_config)
        assert inspect_encoder(config).model == "CLIPVisionModel"


class TestMistakes:
    def test_no_such_file(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="nowhere cannot be read"):
            inspect_encoder("nowhere")
        with pytest.raises(ValueError, match=r"config\.json cannot be read"):
            inspect_encoder(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not JSON"),
            ("[1]", "holds no configuration, but a list"),
            ('{"patchsize": 4}', "Unknown key 'patchsize'"),
            ('{"img_size": "224"}', "expected int"),
            ('{"model_type": "no_such_model"}', "no_such_model"),
        ],
    )
    def test_wrong_file(self, content, message, tmp_path) -> None:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            inspect_encoder(tmp_path)

    def test_no_pictures(self) -> None:
        config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        with pytest.raises(ValueError, match="There is no encoder to inspect: a model of type 'llama' is no encoder"):
            inspect_encoder(config)
        with pytest.raises(ValueError, match="LlamaModel reads no pictures; leave out the image size"):
            inspect_encoder(config, image_size=32)

    def test_inputs_of_another_kind(self) -> None:
        config = Siglip2VisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        with pytest.raises(ValueError, match=r"cannot encode pictures of 64x64 pixels.*spatial_shapes"):
            inspect_encoder(config, image_size=64)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": 225}, "225x225 pixels: .*multiples of the patch size 16"),
            ({"image_size": (224, -16)}, "at least 1, found 224x-16"),
            ({"batch_size": 0}, "at least 1, found 0"),
        ],
        ids=str,
    )
    def test_wrong_numbers(self, options, message) -> None:
        with pytest.raises(ValueError, match=message):
            inspect_encoder(TINY, **options)


class TestRendering:
    def test_table(self) -> None:
        console = Console(width=120, file=io.StringIO())
        console.print(render(inspect_encoder(TINY)))
        text = console.file.getvalue()
        lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
        assert lines[0] == "OmniVisionModel: 1 picture of 224x224 pixels"
        assert "patch embedding 1 x 128 x 14 x 14 98,432 38.5 M 98.0 KiB" in lines
        assert "scores 1 x 2 x 197 x 197 19.9 M 303.2 KiB" in lines
        assert "total 916,992 427.9 M 7,516.3 KiB" in lines
        assert "│   attention " in text

    def test_json(self) -> None:
        inspection = inspect_encoder(TINY, batch_size=2)
        assert Inspection.model_validate_json(inspection.model_dump_json()) == inspection
        assert json.loads(inspection.model_dump_json())["parameters"] == 916_992

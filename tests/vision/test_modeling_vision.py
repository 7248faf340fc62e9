"""The encoder against an independent stack of `torch.nn` layers that carries the same weights, and the rest of it."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from omni.vision.configuration_vision import OmniVisionConfig
from omni.vision.modeling_vision import OmniVisionModel

from ..conftest import assert_same, randomise

TINY = {"img_size": 224, "patch": 16, "d_model": 128, "n_layers": 4, "n_heads": 2, "d_ff": 512}
SMALL = {"img_size": 24, "patch": 8, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 48}
OTHER = {"img_size": 60, "patch": 12, "d_model": 48, "n_layers": 3, "n_heads": 4, "d_ff": 80}


class ReferenceEncoder(nn.Module):
    """The seed's encoder from the parts of `torch.nn` that it names; float[B, 3, H, W] -> cls and grid."""

    def __init__(
        self, img_size: int, patch: int, d_model: int, n_layers: int, n_heads: int, d_ff: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, d_model, kernel_size=patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, d_model))
        self.pos = nn.Parameter(torch.zeros(1, 1 + (img_size // patch) ** 2, d_model))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d_model, n_heads, d_ff, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(n_layers)
        )
        self.norm = nn.RMSNorm(d_model, eps=1e-5)

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.proj(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(pixels), -1, -1), patches], dim=1) + self.pos

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.tokens(pixels)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, :1], x[:, 1:]

    def maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        x, maps = self.tokens(pixels), []
        for block in self.blocks:
            y = block.norm1(x)
            maps.append(block.self_attn(y, y, y, need_weights=True, average_attn_weights=False)[1])
            x = block(x)
        return maps


NAMES = {
    "embeddings.cls_token": "cls",
    "embeddings.position_embeddings": "pos",
    "embeddings.patch_embeddings.": "proj.",
    "layers.": "blocks.",
    "attention.qkv.": "self_attn.in_proj_",
    "attention.o_proj.": "self_attn.out_proj.",
    "mlp.fc1.": "linear1.",
    "mlp.fc2.": "linear2.",
}
"""Our names and those of `torch.nn`."""


def reference_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def build(sizes: dict, implementation: str = "sdpa", **options) -> OmniVisionModel:
    model = OmniVisionModel(OmniVisionConfig(**sizes, attn_implementation=implementation, **options))
    randomise(model)
    return model.eval()


def pair(sizes: dict, implementation: str, dtype: torch.dtype, dropout: float = 0.1):
    """Our encoder, the reference with the same weights, and pictures."""
    model = build(sizes, implementation, dropout=dropout).to(dtype)
    reference = ReferenceEncoder(**sizes, dropout=dropout).to(dtype).eval()
    reference.load_state_dict({reference_name(name): value for name, value in model.state_dict().items()})
    return model, reference, pictures(sizes["img_size"], dtype=dtype)


def pictures(height: int, width: int | None = None, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width or height, generator=generator).to(dtype)


def backward(cls: torch.Tensor, grid: torch.Tensor | None) -> None:
    """A loss in which every number of the outputs has a weight of its own."""
    outputs = cls if grid is None else torch.cat([cls, grid], dim=1)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    (outputs * weights.sin()).sum().div(len(outputs)).backward()


# Double precision shows that the arithmetic is the same, single that nothing is lost in what users run. Eager attention
# takes its softmax in single precision, whatever the model's.
PARITY = [("sdpa", torch.float64, 1e-11), ("sdpa", torch.float32, 1e-5), ("eager", torch.float32, 1e-5)]


@pytest.mark.parametrize(("implementation", "dtype", "tolerance"), PARITY)
@pytest.mark.parametrize("sizes", [TINY, SMALL, OTHER], ids=["tiny", "small", "other"])
class TestAgainstTorch:
    def test_outputs_and_gradients(self, sizes, implementation, dtype, tolerance) -> None:
        model, reference, pixels = pair(sizes, implementation, dtype)
        ours, theirs = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
        output = model(ours)
        cls, grid = reference(theirs)
        n, d = (sizes["img_size"] // sizes["patch"]) ** 2, sizes["d_model"]
        assert output.cls.shape == (2, 1, d)
        assert output.grid.shape == (2, n, d)
        assert_same(output.cls, cls, tolerance, "cls")
        assert_same(output.grid, grid, tolerance, "grid")
        backward(output.cls, output.grid)
        backward(cls, grid)
        assert_same(ours.grad, theirs.grad, tolerance, "gradient of the pixels")
        expected = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            assert_same(parameter.grad, expected.pop(reference_name(name)).grad, tolerance, f"gradient of {name}")
        assert not expected

    @torch.no_grad()
    def test_attention_maps(self, sizes, implementation, dtype, tolerance) -> None:
        model, reference, pixels = pair(sizes, implementation, dtype)
        output = model(pixels, output_attentions=True)
        n = 1 + (sizes["img_size"] // sizes["patch"]) ** 2
        maps = reference.maps(pixels)
        assert len(output.attentions) == len(maps) == sizes["n_layers"]
        tolerance = max(tolerance, 1e-6)  # maps come from eager attention, so in single precision
        for found, expected in zip(output.attentions, maps, strict=True):
            assert found.shape == (2, sizes["n_heads"], n, n)
            assert_same(found, expected, tolerance, "map")
            torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=0, atol=1e-5)
        assert_same(output.cls, model(pixels).cls, tolerance, "cls, with maps and without")


class TestSize:
    def test_parameters_of_the_seed(self) -> None:
        model = OmniVisionModel(OmniVisionConfig.from_json_file("configs/vision_tiny.json"))
        assert model.num_parameters() == 916_992
        assert [sum(p.numel() for p in layer.parameters()) for layer in model.layers] == [198_272] * 4
        assert sum(p.numel() for p in ReferenceEncoder(**TINY).parameters()) == 916_992

    def test_names_of_the_weights(self) -> None:
        parts = ["norm1", "attention.qkv", "attention.o_proj", "norm2", "mlp.fc1", "mlp.fc2"]
        expected = ["embeddings.cls_token", "embeddings.position_embeddings"]
        expected += [f"embeddings.patch_embeddings.{kind}" for kind in ("weight", "bias")]
        expected += [f"layers.{i}.{part}.{kind}" for i in range(4) for part in parts for kind in ("weight", "bias")]
        assert list(OmniVisionModel(OmniVisionConfig()).state_dict()) == [*expected, "norm.weight"]

    def test_golden_number(self) -> None:
        """Weights from a formula, one number out; computed once, in double precision, with the reference stack."""
        model = OmniVisionModel(OmniVisionConfig(**SMALL)).eval()
        reference = ReferenceEncoder(**SMALL).double().eval()
        pixels = torch.linspace(-3, 3, 3 * 24 * 24, dtype=torch.float64).cos().view(1, 3, 24, 24)
        with torch.no_grad():
            for k, parameter in enumerate(model.parameters()):
                wave = (torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + k).sin()
                parameter.copy_(wave.view_as(parameter) * 0.4)
            reference.load_state_dict({reference_name(name): value for name, value in model.state_dict().items()})
            output = model(pixels.float())
            number = output.cls.abs().sum() + output.grid.abs().sum()
            cls, grid = reference(pixels)
        assert float(cls.abs().sum() + grid.abs().sum()) == pytest.approx(GOLDEN, rel=1e-9)
        assert number.item() == pytest.approx(GOLDEN, rel=1e-5)

    @pytest.mark.parametrize("how", ["built", "loaded from nothing"])
    def test_initial_weights(self, how) -> None:
        config = OmniVisionConfig(initializer_range=0.05)
        if how == "built":
            model = OmniVisionModel(config)
        else:  # by another path: first without contents, then initialised as far as no file has them
            model, _ = OmniVisionModel.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "cls_token", "position_embeddings")):
                assert not parameter.any(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name
            else:
                assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name


GOLDEN = 60.782544465036764


@contextmanager
def recorded_dropout(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """Every dropout in the order in which it happens: where, the shape, and the probability that is in force."""
    calls: list[tuple] = []
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def record_dropout(input, p=0.5, training=True, inplace=False):
        calls.append(("dropout", tuple(input.shape), p if training else 0.0))
        return dropout(input, p, training, inplace)

    def record_attention(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
        calls.append(("attention", (*query.shape[:-1], key.shape[-2]), dropout_p))
        return attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "dropout", record_dropout)
        patch.setattr(F, "scaled_dot_product_attention", record_attention)
        yield calls


class TestDropout:
    def test_places(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, reference, pixels = pair(SMALL, "sdpa", torch.float32, dropout=0.3)
        with recorded_dropout(monkeypatch) as ours:
            model.train()(pixels)
        with recorded_dropout(monkeypatch) as theirs:
            reference.train()(pixels)
        assert ours == theirs
        attention = ("attention", (2, 2, 10, 10), 0.3)
        residual, inside = ("dropout", (2, 10, 32), 0.3), ("dropout", (2, 10, 48), 0.3)
        assert ours == [attention, residual, inside, residual] * 2

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_training_step_with_the_same_masks(self, implementation) -> None:
        model, reference, pixels = pair(SMALL, implementation, torch.float32, dropout=0.3)
        model.train(), reference.train()
        # of two pictures, nn.MultiheadAttention lays its output out otherwise in memory, and masks follow the layout
        pixels = pixels[:1]
        torch.manual_seed(0)
        output = model(pixels)
        torch.manual_seed(0)
        cls, grid = reference(pixels)
        assert_same(output.cls, cls, 1e-5)
        assert_same(output.grid, grid, 1e-5)
        backward(output.cls, output.grid)
        backward(cls, grid)
        expected = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            assert_same(parameter.grad, expected[reference_name(name)].grad, 1e-5, name)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @torch.no_grad()
    def test_only_in_training(self, implementation, monkeypatch: pytest.MonkeyPatch) -> None:
        model, pixels = build(SMALL, implementation, dropout=0.3), pictures(24)
        without = build(SMALL, implementation, dropout=0.0)
        with recorded_dropout(monkeypatch) as calls:
            still = model(pixels).last_hidden_state
        assert all(p == 0 for _, _, p in calls)
        assert torch.equal(still, model(pixels).last_hidden_state)
        assert torch.equal(still, without(pixels).last_hidden_state)
        assert torch.equal(still, without.train()(pixels).last_hidden_state)
        model.train()
        assert not torch.allclose(model(pixels).last_hidden_state, model(pixels).last_hidden_state, atol=1e-2)

    @torch.no_grad()
    def test_maps_show_the_attention_before_dropout(self) -> None:
        for maps in build(SMALL, dropout=0.5).train()(pictures(24), output_attentions=True).attentions:
            torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))


class TestClsOnly:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("sizes", [SMALL, OTHER, {**SMALL, "n_layers": 1}], ids=["small", "other", "one block"])
    def test_same_cls_and_gradients(self, sizes, implementation) -> None:
        full, pixels = build(sizes, implementation), pictures(sizes["img_size"]).requires_grad_()
        alone, same_pixels = copy.deepcopy(full), pixels.detach().clone().requires_grad_()
        expected, found = full(pixels), alone(same_pixels, cls_only=True)
        assert found.grid is None
        assert found.last_hidden_state.shape == found.cls.shape == (2, 1, sizes["d_model"])
        assert_same(found.cls, expected.cls, 1e-5)
        assert torch.equal(found.pooler_output, found.cls[:, 0])
        backward(expected.cls, None)
        backward(found.cls, None)
        assert_same(same_pixels.grad, pixels.grad, 1e-5, "pixels")
        for (name, parameter), reference in zip(alone.named_parameters(), full.parameters(), strict=True):
            assert_same(parameter.grad, reference.grad, 1e-5, name)

    @torch.no_grad()
    def test_last_block_computes_one_row(self) -> None:
        model, rows = build(TINY), {}

        def record(name: str, output: torch.Tensor | tuple) -> None:
            rows[name] = (output[0] if isinstance(output, tuple) else output).shape[1]

        for name, module in model.named_modules():
            if name.startswith("layers."):
                module.register_forward_hook(lambda _, args, output, name=name: record(name, output))
        model(pictures(224), cls_only=True)
        assert rows["layers.3.norm1"] == 197  # keys and values are still of every token
        last = ["attention", "attention.o_proj", "dropout", "norm2", "mlp.fc1", "mlp.dropout", "mlp.fc2", "mlp"]
        assert {rows[f"layers.3.{part}"] for part in last} == {rows["layers.3"]} == {1}
        assert {rows[f"layers.{i}.{part}"] for i in range(3) for part in last} == {197}

    def test_operations_saved(self) -> None:
        with torch.device("meta"):  # where the counter also sees what is inside of the attention
            model, pixels = OmniVisionModel(OmniVisionConfig(**TINY)).eval(), torch.empty(1, 3, 224, 224)

        def operations(**options) -> int:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(pixels, **options)
            return counter.get_total_flops()

        n, d, ff = 197, 128, 512
        block = n * (4 * d * d + 2 * d * ff) + 2 * n * n * d  # multiply-adds: q, k, v, o, MLP; scores, sum of values
        one_row = n * 2 * d * d + (2 * d * d + 2 * d * ff) + 2 * n * d
        assert operations() - operations(cls_only=True) == 2 * (block - one_row)

    @torch.no_grad()
    def test_maps(self) -> None:
        model, pixels = build(SMALL), pictures(24)
        found, expected = (model(pixels, cls_only=c, output_attentions=True).attentions for c in (True, False))
        assert_same(found[0], expected[0], 1e-5)
        assert found[1].shape == (2, 2, 1, 10)
        assert_same(found[1], expected[1][:, :, :1], 1e-5)


def cubic_matrix(inputs: int, outputs: int) -> np.ndarray:
    """float64[outputs, inputs] of cubic convolution (Keys 1981, a = -0.75), pixel centres aligned, border repeated."""
    a, matrix = -0.75, np.zeros((outputs, inputs))
    for i in range(outputs):
        position = (i + 0.5) * inputs / outputs - 0.5
        for j in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            x = abs(position - j)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(j, 0), inputs - 1)] += near if x <= 1 else far
    return matrix


class TestResolution:
    @pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 16), (24, 32), (32, 24), (8, 72)])
    def test_refused_unless_asked_for(self, height, width) -> None:
        with pytest.raises(ValueError, match=rf"24x24 pixels, found {height}x{width}.*interpolate_pos_encoding=True"):
            build(SMALL)(pictures(height, width))

    @pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 16), (48, 8), (8, 72), (24, 16)])
    @torch.no_grad()
    def test_interpolated_positions(self, height, width) -> None:
        model, pixels = build(SMALL), pictures(height, width)
        table = model.embeddings.position_embeddings[0, 1:].double().numpy().reshape(3, 3, 32)
        rows, columns = cubic_matrix(3, height // 8), cubic_matrix(3, width // 8)
        stretched = np.einsum("hi,wj,ijd->hwd", rows, columns, table).reshape(-1, 32)
        positions = np.concatenate([model.embeddings.position_embeddings[0, :1].numpy(), stretched])
        expected = model.embeddings.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        expected = torch.cat([model.embeddings.cls_token.expand(2, -1, -1), expected], dim=1)
        expected = expected + torch.from_numpy(positions).float()
        assert_same(model.embeddings(pixels, interpolate_pos_encoding=True), expected, 1e-5)
        output = model(pixels, interpolate_pos_encoding=True)
        assert output.grid.shape == (2, height // 8 * (width // 8), 32)

    @torch.no_grad()
    def test_grid_is_in_reading_order(self) -> None:
        model = build({**SMALL, "n_layers": 1})
        model.embeddings.patch_embeddings.weight.zero_()
        table = torch.arange(3.0).expand(3, 3).reshape(9, 1).expand(9, 32)  # tells the column, not the row
        model.embeddings.position_embeddings[0, 1:] = table
        grid = model.embeddings(pictures(48, 72), interpolate_pos_encoding=True)[0, 1:].view(6, 9, 32)
        torch.testing.assert_close(grid, grid[:1].expand_as(grid))
        assert (grid[0].diff(dim=0) > 0).all()

    @torch.no_grad()
    def test_own_size_is_not_touched(self) -> None:
        model, pixels = build(SMALL), pictures(24)
        assert torch.equal(
            model(pixels).last_hidden_state, model(pixels, interpolate_pos_encoding=True).last_hidden_state
        )

    def test_gradient_reaches_the_table(self) -> None:
        model = build(SMALL)
        model(pictures(40, 16), interpolate_pos_encoding=True).grid.sum().backward()
        assert model.embeddings.position_embeddings.grad[0, 1:].ne(0).any(-1).all()

    @torch.no_grad()
    def test_half_precision_table(self) -> None:
        model = build(SMALL).bfloat16()
        for parameter in (model.embeddings.cls_token, *model.embeddings.patch_embeddings.parameters()):
            parameter.zero_()  # nothing but positions is left
        found = model.embeddings(pictures(56, 40), interpolate_pos_encoding=True)
        exact = model.float().embeddings(pictures(56, 40), interpolate_pos_encoding=True)
        assert torch.equal(found, exact.bfloat16())  # interpolated in full, rounded once

    @pytest.mark.parametrize(("height", "width"), [(25, 24), (24, 31), (7, 7)])
    def test_whole_patches_only(self, height, width) -> None:
        with pytest.raises(ValueError, match=f"multiples of the patch size 8, found {height}x{width}"):
            build(SMALL)(pictures(height, width), interpolate_pos_encoding=True)

    @pytest.mark.parametrize("channels", [1, 4])
    @pytest.mark.parametrize("interpolate", [False, True])
    def test_wrong_channels(self, channels, interpolate) -> None:
        with pytest.raises(ValueError, match=f"3 channels, found {channels}"):
            build(SMALL)(torch.zeros(1, channels, 24, 24), interpolate_pos_encoding=interpolate)

    @pytest.mark.parametrize("shape", [(3, 24, 24), (1, 2, 3, 24, 24), (24, 24)])
    def test_wrong_axes(self, shape) -> None:
        with pytest.raises(ValueError, match=re.escape(f"(B, C, H, W), found {shape}")):
            build(SMALL)(torch.zeros(shape))

    @torch.no_grad()
    def test_other_channels_by_configuration(self) -> None:
        assert build(SMALL, num_channels=1)(torch.zeros(1, 1, 24, 24)).grid.shape == (1, 9, 32)


class TestOutputs:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @torch.no_grad()
    def test_hidden_states_and_attentions(self, implementation) -> None:
        model, pixels = build(OTHER, implementation), pictures(60)
        output = model(pixels, output_hidden_states=True, output_attentions=True)
        assert [state.shape for state in output.hidden_states] == [(2, 26, 48)] * 4
        assert [maps.shape for maps in output.attentions] == [(2, 4, 26, 26)] * 3
        assert torch.equal(output.hidden_states[0], model.embeddings(pixels))
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)

    @torch.no_grad()
    def test_nothing_that_was_not_asked_for(self) -> None:
        output = build(SMALL)(pictures(24))
        assert list(output.keys()) == ["last_hidden_state", "pooler_output", "cls", "grid"]
        assert torch.equal(output.last_hidden_state, torch.cat([output.cls, output.grid], dim=1))
        assert torch.equal(output.pooler_output, output.cls[:, 0])

    @torch.no_grad()
    def test_attentions_asked_for_in_the_configuration(self) -> None:
        model = OmniVisionModel(OmniVisionConfig(**SMALL, output_attentions=True)).eval()
        assert len(model(pictures(24)).attentions) == 2
        assert "attentions" not in model(pictures(24), output_attentions=False)

    @torch.no_grad()
    def test_a_picture_does_not_depend_on_its_batch(self) -> None:
        model, pixels = build(SMALL), pictures(24, batch=3)
        together = model(pixels).last_hidden_state
        for i in range(3):
            assert_same(model(pixels[i : i + 1]).last_hidden_state, together[i : i + 1], 1e-5)

    @pytest.mark.parametrize("cls_only", [False, True])
    def test_every_parameter_receives_a_gradient(self, cls_only) -> None:
        model = OmniVisionModel(OmniVisionConfig(**SMALL))  # as training finds it, zeros included
        output = model(pictures(24), cls_only=cls_only)
        backward(output.cls, output.grid)
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


class TestTraining:
    @pytest.mark.parametrize("options", [{}, {"cls_only": True}, {"output_attentions": True}], ids=str)
    def test_activation_checkpointing(self, options) -> None:
        model, pixels = build(SMALL, dropout=0.2).train(), pictures(24)
        runs = []
        for checkpointing in (False, True):
            again = copy.deepcopy(model)
            if checkpointing:  # older transformers know the other name only
                getattr(again, "activation_checkpointing_enable", again.gradient_checkpointing_enable)()
            calls: list[str] = []
            again.layers[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append("mlp"))
            torch.manual_seed(0)
            output = again(pixels, **options)
            backward(output.cls, output.grid)
            assert len(calls) == 1 + checkpointing  # once more in the backward pass
            runs.append([output.last_hidden_state, *(p.grad for p in again.parameters())])
        for plain, checkpointed in zip(*runs, strict=True):
            assert torch.equal(plain, checkpointed)

    @torch.no_grad()
    def test_bfloat16_is_close(self) -> None:
        model, pixels = build(TINY), pictures(224)
        exact = model(pixels)
        rounded = copy.deepcopy(model).bfloat16()(pixels)
        assert rounded.cls.dtype == torch.bfloat16  # and the pixels were converted
        for found, expected in ((rounded.cls, exact.cls), (rounded.grid, exact.grid)):
            assert F.cosine_similarity(found.float(), expected, dim=-1).min() > 0.999
            assert_same(found.float(), expected, 5e-2)

    def compiled(self, backend: str, **options) -> None:
        model, pixels = build(SMALL), pictures(24)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
        expected, found = model(pixels, **options), compiled(pixels, **options)
        assert_same(found.last_hidden_state, expected.last_hidden_state, 1e-5)
        backward(expected.cls, expected.grid)
        backward(found.cls, found.grid)
        for (name, parameter), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
            assert_same(other.grad, parameter.grad, 1e-5, name)

    @pytest.mark.parametrize("options", [{}, {"cls_only": True}], ids=str)
    def test_compile_without_graph_breaks(self, options) -> None:
        torch.compiler.reset()
        self.compiled("aot_eager", **options)

    @pytest.mark.slow
    def test_compile_with_inductor(self) -> None:
        torch.compiler.reset()
        self.compiled("inductor")

    def test_export(self) -> None:
        model, pixels = build(SMALL), pictures(24)
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(model, (), {"pixel_values": pixels}, dynamic_shapes={"pixel_values": {0: batch}})
        many = pictures(24, batch=5)
        assert_same(exported.module()(pixel_values=many).cls, model(many).cls, 1e-5)


class TestSaving:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_round_trip(self, dtype, tmp_path) -> None:
        model, pixels = build(SMALL).to(dtype), pictures(24)
        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "config.json",
            "model.safetensors",
            "omni_remote.py",
            "seal.json",
        ]
        again = OmniVisionModel.from_pretrained(tmp_path).eval()
        assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
        assert list(again.state_dict()) == list(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert again.state_dict()[name].dtype == dtype
            assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(again(pixels).last_hidden_state, model(pixels).last_hidden_state)

    def test_input_embeddings(self) -> None:
        model = build(SMALL)
        assert model.get_input_embeddings() is model.embeddings.patch_embeddings

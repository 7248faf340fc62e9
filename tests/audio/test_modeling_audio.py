"""The encoder against independent stacks of `torch.nn` layers and Whisper's stem, and padding that changes nothing."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omni.audio.configuration_audio import OmniAudioConfig
from omni.audio.modeling_audio import OmniAudioModel, sinusoids

from ..conftest import assert_same, randomise

SMALL = {"mel_bins": 10, "downsample_time": 4, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 48, "dropout": 0.1}
MICRO = {"stem": "conv2d", "block_norm": "rms_norm", "position_embedding": "none", "cls_token": False}
"""What makes it micro-Omni's; tests/exchange/micro_omni compares it with that."""
KINDS = [
    {},
    MICRO,
    {"cls_token": False},
    {"block_norm": "rms_norm", "position_embedding": "none", "downsample_time": 2},
    {"stem": "conv2d", "stem_channels": 6, "downsample_time": 8},
]
LENGTHS = [21, 13, 1, 16]


def build(implementation: str = "sdpa", **options) -> OmniAudioModel:
    model = OmniAudioModel(OmniAudioConfig(**{**SMALL, **options}, attn_implementation=implementation))
    randomise(model)
    return model.eval()


def sounds(
    lengths: list[int], bands: int = 10, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and mask; rubbish where there is padding."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(len(lengths), max(lengths), bands, generator=generator).to(dtype)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return features, mask


def backward(output) -> None:
    """A loss in which every number of the outputs has a weight of its own."""
    values = torch.cat([output.cls.flatten(), output.grid.flatten()])
    (values * torch.linspace(-1, 1, len(values), dtype=values.dtype).sin()).sum().backward()


# --- Against torch.nn -------------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """The encoder from the parts of `torch.nn` that it names, one sound at a time, so that there is no padding at all."""

    def __init__(self, config: OmniAudioConfig) -> None:
        super().__init__()
        self.config, d = config, config.hidden_size
        self.stem = nn.Module()
        steps = range(config.num_halvings)
        if config.stem == "conv1d":
            first = nn.Conv1d(config.num_mel_bins, d, 3, padding=1)
            self.stem.convolutions = nn.ModuleList([first, *(nn.Conv1d(d, d, 3, stride=2, padding=1) for _ in steps)])
        else:
            c = config.stem_channels
            self.stem.convolutions = nn.ModuleList(nn.Conv2d(c if i else 1, c, 3, stride=2, padding=1) for i in steps)
            self.stem.projection = nn.Linear(c * math.ceil(config.num_mel_bins / config.time_reduction), d)
        if config.cls_token:
            self.cls = nn.Parameter(torch.zeros(1, 1, d))
        self.blocks = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            block = nn.TransformerEncoderLayer(
                d, config.num_attention_heads, config.intermediate_size, 0.0, "gelu", batch_first=True, norm_first=True
            )
            if config.block_norm == "rms_norm":
                block.norm1, block.norm2 = (nn.RMSNorm(d, eps=1e-5) for _ in range(2))
            self.blocks.append(block)
        self.norm = nn.RMSNorm(d, eps=1e-5)

    def forward(self, sound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float[F, M] -> cls float[1, D] and grid float[N, D]."""
        one_dimension = self.config.stem == "conv1d"
        x = sound.T[None] if one_dimension else sound[None, None]
        for convolution in self.stem.convolutions:
            x = F.gelu(convolution(x))
        if one_dimension:
            x = x.transpose(1, 2)
        else:
            x = self.stem.projection(torch.stack([x[0, :, t].flatten() for t in range(x.shape[2])])[None])
        if self.config.position_embedding == "sinusoidal":
            half = x.shape[2] // 2
            for i in range(half):
                angle = torch.arange(x.shape[1]) / 10_000 ** (i / (half - 1))
                x = x + F.one_hot(torch.tensor(i), x.shape[2]) * angle.sin()[:, None].to(x.dtype)
                x = x + F.one_hot(torch.tensor(half + i), x.shape[2]) * angle.cos()[:, None].to(x.dtype)
        if self.config.cls_token:
            x = torch.cat([self.cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)[0]
        return (x[:1], x[1:]) if self.config.cls_token else (x.mean(0, keepdim=True), x)


NAMES = {
    "embeddings.cls_token": "cls",
    "embeddings.stem.": "stem.",
    "layers.": "blocks.",
    "attention.qkv.": "self_attn.in_proj_",
    "attention.o_proj.": "self_attn.out_proj.",
    "mlp.fc1.": "linear1.",
    "mlp.fc2.": "linear2.",
}
"""Our names and those of the reference."""


def reference_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def pair(kind: dict, implementation: str, dtype: torch.dtype) -> tuple[OmniAudioModel, Reference]:
    model = build(implementation, **{**kind, "dropout": 0.0}).to(dtype)
    reference = Reference(model.config).to(dtype).train()  # in eval mode torch takes a path of its own
    reference.load_state_dict({reference_name(name): value for name, value in model.state_dict().items()})
    return model, reference


PARITY = [("sdpa", torch.float64, 1e-6), ("sdpa", torch.float32, 1e-5), ("eager", torch.float32, 1e-5)]


@pytest.mark.parametrize(("implementation", "dtype", "tolerance"), PARITY)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_outputs_and_gradients_of_a_batch_are_those_of_its_sounds(kind, implementation, dtype, tolerance) -> None:
    """Positions are computed in single precision, hence the tolerance in double."""
    model, reference = pair(kind, implementation, dtype)
    features, mask = sounds(LENGTHS, dtype=dtype)
    output = model(features, mask)
    tokens = [math.ceil(length / model.config.time_reduction) for length in LENGTHS]
    assert output.cls.shape == (4, 1, 32)
    assert output.grid.shape == (4, tokens[0], 32)
    alone = [reference(sound[:length]) for sound, length in zip(features, LENGTHS, strict=True)]
    padded = [F.pad(grid, (0, 0, 0, tokens[0] - len(grid))) for _, grid in alone]
    expected = type(output)(cls=torch.stack([cls for cls, _ in alone]), grid=torch.stack(padded))
    assert_same(output.cls, expected.cls, tolerance, "cls")
    assert_same(output.grid, expected.grid, tolerance, "grid")
    backward(output)
    backward(expected)
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert_same(parameter.grad, gradients.pop(reference_name(name)).grad, 3 * tolerance, f"gradient of {name}")
    assert not gradients


@torch.no_grad()
def test_stem_and_positions_are_whispers() -> None:
    config = WhisperConfig(
        d_model=16, encoder_layers=0, encoder_attention_heads=2, num_mel_bins=10, max_source_positions=11
    )
    whisper = WhisperEncoder(config).eval()
    whisper.layer_norm = nn.Identity()
    ours = OmniAudioModel(
        OmniAudioConfig(num_mel_bins=10, hidden_size=16, time_reduction=2, num_attention_heads=2, cls_token=False)
    ).eval()
    for convolution, source in zip(ours.embeddings.stem.convolutions, (whisper.conv1, whisper.conv2), strict=True):
        convolution.load_state_dict(source.state_dict())
    features, _ = sounds([22])
    expected = whisper(features.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(ours.embeddings(features, None)[0], expected)
    torch.testing.assert_close(sinusoids(11, 16, torch.device("cpu")), whisper.embed_positions.weight)


# --- Padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_what_stands_in_padding_does_not_matter(kind, implementation) -> None:
    model = build(implementation, **kind)
    features, mask = sounds(LENGTHS)
    found = model(features, mask)
    nothing = model(features.masked_fill(mask[:, :, None] == 0, float("nan")), mask)
    assert torch.equal(found.last_hidden_state, nothing.last_hidden_state)
    assert torch.equal(found.cls, nothing.cls)
    longer = model(F.pad(features, (0, 0, 0, 30), value=7.0), F.pad(mask, (0, 30)))
    assert_same(longer.cls, found.cls, 1e-5)
    assert_same(longer.grid[:, : found.grid.shape[1]], found.grid, 1e-5)
    assert not longer.grid[:, found.grid.shape[1] :].any()


@torch.no_grad()
def test_a_mask_of_ones_is_none() -> None:
    model, (features, _) = build(), sounds([21, 21])
    assert torch.equal(model(features, torch.ones(2, 21)).grid, model(features).grid)


@pytest.mark.parametrize("reduction", [2, 4, 8])
@torch.no_grad()
def test_as_many_tokens_as_begun_stretches(reduction: int) -> None:
    for stem in ("conv1d", "conv2d"):
        model = build(stem=stem, downsample_time=reduction, n_layers=1)
        for frames in range(1, 2 * reduction + 2):
            features, mask = sounds([frames, 1])
            output = model(features, mask)
            assert output.grid.shape[1] == math.ceil(frames / reduction)
            assert output.grid[1].any(-1).tolist() == [True] + [False] * (output.grid.shape[1] - 1)


@pytest.mark.parametrize(
    "mask",
    [[[0, 1, 1, 1]], [[1, 0, 1, 1]], [[0, 0, 0, 0]], [[1, 1, 0, 1]]],
    ids=["left", "hole", "nothing", "end"],
)
def test_a_mask_that_is_not_ones_and_then_zeros(mask) -> None:
    with pytest.raises(ValueError, match="ones for the frames of each sound, at least one, and then zeros"):
        build()(torch.zeros(1, 4, 10), torch.tensor(mask))


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.zeros(4, 10), None, r"float\[I, F, 10\].* found torch.float32 of shape \(4, 10\)"),
        (torch.zeros(1, 10, 4), None, r"of shape \(1, 10, 4\); make them with the feature extractor"),
        (torch.zeros(1, 4, 10, dtype=torch.int16), None, "found torch.int16"),
        (torch.zeros(2, 4, 10), torch.ones(2, 5), r"a mask \(2, 4\) as the features, found \(2, 5\)"),
    ],
    ids=["axes", "turned", "integers", "mask"],
)
def test_wrong_shapes(features, mask, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()(features, mask)


# --- Size and names ---------------------------------------------------------------------------------------------------


def test_parameters_and_names() -> None:
    model = OmniAudioModel(OmniAudioConfig.from_json_file("configs/audio_tiny.json"))
    assert model.num_parameters() == 2_158_464
    parts = ["norm1", "attention.qkv", "attention.o_proj", "norm2", "mlp.fc1", "mlp.fc2"]
    expected = ["embeddings.cls_token"]
    expected += [f"embeddings.stem.convolutions.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")]
    expected += [f"layers.{i}.{part}.{kind}" for i in range(4) for part in parts for kind in ("weight", "bias")]
    assert list(model.state_dict()) == [*expected, "norm.weight"]
    assert model.get_input_embeddings() is model.embeddings.stem


@torch.no_grad()
def test_golden_number() -> None:
    """Weights from a formula, one number out; computed once, in double precision, with the reference stack."""
    model, reference = pair({}, "sdpa", torch.float64)
    for k, (name, parameter) in enumerate(model.named_parameters()):
        wave = (torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + k).sin().view_as(parameter) * 0.4
        parameter.copy_(wave)
        dict(reference.named_parameters())[reference_name(name)].copy_(wave)
    sound = torch.linspace(-3, 3, 210, dtype=torch.float64).cos().view(21, 10)
    cls, grid = reference(sound)
    output = model.float()(sound[None].float())
    assert float(cls.abs().sum() + grid.abs().sum()) == pytest.approx(GOLDEN, rel=1e-6)
    assert float(output.cls.abs().sum() + output.grid.abs().sum()) == pytest.approx(GOLDEN, rel=1e-5)


GOLDEN = 45.67321593571681


@pytest.mark.parametrize("how", ["built", "loaded from nothing"])
def test_initial_weights(how: str) -> None:
    config = OmniAudioConfig(initializer_range=0.05)
    if how == "built":
        model = OmniAudioModel(config)
    else:  # by another path: first without contents, then initialised as far as no file has them
        model, _ = OmniAudioModel.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "cls_token")):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = (2 / parameter[0].numel()) ** 0.5 if "convolutions" in name else 0.05
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


# --- What is asked of any encoder -------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_hidden_states_and_attentions(implementation: str) -> None:
    model, (features, mask) = build(implementation), sounds(LENGTHS)
    output = model(features, mask, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(4, 7, 32)] * 3
    assert [maps.shape for maps in output.attentions] == [(4, 2, 7, 7)] * 2
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    for maps in output.attentions:
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
        assert not maps[2, :, :, 2:].any()  # of the sound of one token nobody looks behind it
    plain = model(features, mask)
    assert_same(output.last_hidden_state, plain.last_hidden_state, 1e-5)
    assert list(plain.keys()) == ["last_hidden_state", "pooler_output", "cls", "grid"]
    assert torch.equal(plain.last_hidden_state, torch.cat([plain.cls, plain.grid], dim=1))
    assert torch.equal(plain.pooler_output, plain.cls[:, 0])
    assert "attentions" not in OmniAudioModel(OmniAudioConfig(**SMALL, output_attentions=True)).eval()(
        features, mask, output_attentions=False
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_parameter_receives_a_gradient(kind: dict) -> None:
    model = OmniAudioModel(OmniAudioConfig(**{**SMALL, **kind}))  # as training finds it, zeros included
    backward(model(*sounds(LENGTHS)))
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}], ids=str)
def test_activation_checkpointing(options: dict) -> None:
    model, (features, mask) = build(dropout=0.2).train(), sounds(LENGTHS)
    runs = []
    for checkpointing in (False, True):
        again = copy.deepcopy(model)
        if checkpointing:
            again.gradient_checkpointing_enable()
        calls: list[str] = []
        again.layers[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append("mlp"))
        torch.manual_seed(0)
        output = again(features, mask, **options)
        backward(output)
        assert len(calls) == 1 + checkpointing  # once more in the backward pass
        runs.append([output.last_hidden_state, *(p.grad for p in again.parameters())])
    for plain, checkpointed in zip(*runs, strict=True):
        assert torch.equal(plain, checkpointed)


@torch.no_grad()
def test_bfloat16_is_close() -> None:
    model, (features, mask) = build(), sounds(LENGTHS)
    rounded = copy.deepcopy(model).bfloat16()(features, mask)
    assert rounded.cls.dtype == torch.bfloat16  # and the features were converted
    expected = model(features, mask)
    assert F.cosine_similarity(rounded.cls.float(), expected.cls, dim=-1).min() > 0.99
    assert_same(rounded.grid.float(), expected.grid, 0.15)


def test_compile_without_graph_breaks() -> None:
    torch.compiler.reset()
    model, (features, mask) = build(), sounds(LENGTHS)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    expected, found = model(features, mask), compiled(features, mask)
    assert_same(found.last_hidden_state, expected.last_hidden_state, 1e-5)
    backward(expected)
    backward(found)
    for (name, parameter), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert_same(other.grad, parameter.grad, 1e-5, name)


def test_export() -> None:
    model, (features, mask) = build(), sounds([16, 13])
    batch, frames = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("frames", min=1, max=64)
    axes = {0: batch, 1: 4 * frames}
    exported = torch.export.export(
        model,
        (),
        {"input_features": features, "attention_mask": mask},
        dynamic_shapes={"input_features": axes, "attention_mask": axes},
    )
    features, mask = sounds([20, 7, 1])
    assert_same(exported.module()(input_features=features, attention_mask=mask).cls, model(features, mask).cls, 1e-5)


@torch.no_grad()
def test_saved_and_loaded_strictly(tmp_path) -> None:
    model, (features, mask) = build(), sounds(LENGTHS)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is OmniAudioModel
    assert torch.equal(again(features, mask).last_hidden_state, model(features, mask).last_hidden_state)
    state = model.state_dict()
    del state["layers.1.mlp.fc2.bias"]
    model.save_pretrained(tmp_path / "half", state_dict=state)
    with pytest.raises(ValueError, match="missing: layers.1.mlp.fc2.bias"):
        AutoModel.from_pretrained(tmp_path / "half")

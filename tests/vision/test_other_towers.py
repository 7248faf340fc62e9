"""Every vision encoder of transformers as a tower: a token of its grid is that of its patch, or the tower is refused.

Each type gets a small configuration with random weights. Types that have none here are skipped.
"""

import math
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from omni.fusion.encoding import run_tower
from omni.registry import get_modality

IMAGE, SIDE, PATCH, LARGEST = get_modality("image"), 64, 8, 10_000_000
SIZES = {"image_size": SIDE, "patch_size": PATCH, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "embed_dim": 16, "mlp_ratio": 2}
OWN = {
    "internvl_vision": {**SIZES, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
    "resnet": {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8},
    "radio": {**SIZES, "mlp_ratio": 2.0},
    "swin": {
        "image_size": SIDE,
        "patch_size": 4,
        "embed_dim": 12,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
}


ALWAYS = {
    "aimv2_vision_model", "beit", "chinese_clip_vision_model", "clip_vision_model", "data2vec-vision", "deit", "dinov2",
    "dinov2_with_registers", "dinov3_vit", "dpt", "ijepa", "internvl_vision",
    "mlcd_vision_model", "pixio", "radio", "sam3_vit_model", "sapiens2", "siglip_vision_model",
    "tipsv2_vision_model", "vit", "vit_msn",
}  # fmt: skip
"""Those that docs/compose.md names are neither skipped nor refused."""
REASONS = ("whose last tokens are patches", "expected tokens, float[B, N, D]", "was given 2 items", "tokens for")


def has_patches(model_type: str) -> bool:
    return hasattr(CONFIG_MAPPING[model_type], "patch_size")


def tower(model_type: str) -> Any:
    """A small encoder. Every weight is large enough for its input to matter."""
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    chosen = OWN.get(model_type) or {
        name: size
        for name, size in SIZES.items()
        if isinstance(getattr(default, name, None), int | float) and name not in cls.attribute_map
    }
    config = cls(**chosen)
    with torch.device("meta"):
        meta = IMAGE.build_tower(config)
    assert "pixel_values" in meta.main_input_name
    assert sum(each.numel() for each in meta.parameters()) < LARGEST
    torch.manual_seed(0)
    model = IMAGE.build_tower(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return model


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()


def expect_patches(model: Any) -> None:
    """The gradient of a grid token is largest in the pixels of its patch."""
    pixels = pictures()
    _, items = run_tower("image", {"encoder": model.config, "output": "grid"}, model, {"pixel_values": pixels})
    for picture, item in enumerate(items):
        rows, columns = item.grid_shape
        for place, token in enumerate(item.tokens["grid"]):
            (gradient,) = torch.autograd.grad(token.square().sum(), pixels, retain_graph=True)
            energy = gradient[picture].square().sum(0).reshape(rows, SIDE // rows, columns, SIDE // columns).sum((1, 3))
            assert energy.argmax() == place
        assert len(item.tokens["grid"]) == math.prod(item.grid_shape)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("yolos", "whose last tokens are patches, found a yolos"),
        ("resnet", "whose last tokens are patches, found a resnet"),
        ("vitdet", r"returned float\[2, 24, 8, 8\]; expected tokens"),
        ("pixtral", "was given 2 items; its outputs have rows for {'grid': 1, 'cls': 1}"),
        ("swin", "returned 64 tokens for 256 patches"),
    ],
)
def test_a_tower_whose_tokens_are_not_patches_is_refused(model_type: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        expect_patches(tower(model_type))


@pytest.mark.parametrize("model_type", ["clip_vision_model", "dinov2_with_registers", "beit", "ijepa"])
def test_a_token_is_that_of_its_patch(model_type: str) -> None:
    expect_patches(tower(model_type))


@pytest.mark.long
@pytest.mark.parametrize("model_type", sorted(name for name in MODEL_MAPPING_NAMES if has_patches(name)))
def test_of_its_patch_or_refused(model_type: str) -> None:
    try:
        model = tower(model_type)
        model(pixel_values=pictures())
    except Exception as error:
        if model_type in ALWAYS:
            raise
        pytest.skip(f"no small configuration: {type(error).__name__}: {str(error)[:90]}")
    refusal = ""
    try:
        expect_patches(model)
    except ValueError as error:
        refusal = str(error)
    assert not refusal or model_type not in ALWAYS, refusal
    assert not refusal or any(reason in refusal for reason in REASONS), refusal

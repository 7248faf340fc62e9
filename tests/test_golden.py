"""Golden values: what encoder, projectors and fused model make of weights and inputs that follow from a formula.

No refactoring may move these numbers. They were computed once, in float64, and do not depend on a random generator.
"""

from typing import Any

import pytest
import torch

from omni import OmniConfig, OmniForConditionalGeneration, OmniVisionConfig, OmniVisionModel
from omni.projectors import PROJECTORS

ENCODER: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40, "hidden_dropout_prob": 0.0,
}  # fmt: skip
THINKER: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": True,
}  # fmt: skip
IMAGE = 31


def wave(*shape: int, phase: float) -> torch.Tensor:
    """float64[*shape] between -1 and 1; neighbours differ, rows too."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7310 + phase).reshape(shape)


@torch.no_grad()
def filled(module: torch.nn.Module) -> Any:
    """The module in float64 with weights of a formula: each tensor by its place among the names."""
    module = module.double().eval()
    for place, (name, parameter) in enumerate(sorted(module.named_parameters())):
        scale = 0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(
            scale * wave(*parameter.shape, phase=place) + (1.0 if "norm" in name and "bias" not in name else 0)
        )
    return module


def encoder() -> OmniVisionModel:
    return filled(OmniVisionModel(OmniVisionConfig(**ENCODER)))


def fused() -> OmniForConditionalGeneration:
    section = {"encoder": {"model_type": "omni_vision", **ENCODER}, "output": "cls+grid", "projector": "unshuffle_mlp"}
    config = OmniConfig(modalities={"image": {**section, "factor": 2, "token_id": IMAGE}}, text_config=THINKER)
    return filled(OmniForConditionalGeneration(config))


def some(values: torch.Tensor) -> list[float]:
    """Eight numbers spread over a tensor, and the root of the mean of all squares."""
    flat = values.detach().flatten()
    return [*flat[:: max(1, len(flat) // 8)][:8].tolist(), flat.square().mean().sqrt().item()]


def pictures() -> torch.Tensor:
    return wave(2, 3, 32, 32, phase=0.3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_encoder(attention: str) -> None:
    model = encoder()
    model.set_attn_implementation(attention)
    encoded = model(pictures())
    assert some(encoded.cls) == pytest.approx(ENCODED["cls"], rel=1e-9)
    assert some(encoded.grid) == pytest.approx(ENCODED["grid"], rel=1e-9)
    assert some(model(pictures(), cls_only=True).cls) == pytest.approx(ENCODED["cls"], rel=1e-9)


@pytest.mark.parametrize("name", sorted(PROJECTORS))
def test_projectors(name: str) -> None:
    factor = 2 if PROJECTORS[name].uses_factor else 1
    projector = filled(PROJECTORS[name](24, 16, factor, 2, "cls+grid"))
    tokens = {"cls": wave(2, 1, 24, phase=0.1), "grid": wave(2, 16, 24, phase=0.2)}
    assert some(projector(tokens, (4, 4))) == pytest.approx(PROJECTED[name], rel=1e-9)


def test_the_fused_model() -> None:
    ids = torch.tensor([[5, *[IMAGE] * 5, 7, 8, 9], [IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 3, 4, 6, 2]])
    model = fused()
    logits = model(input_ids=ids, pixel_values=pictures()).logits
    assert some(logits) == pytest.approx(LOGITS, rel=1e-9)
    written = model.generate(input_ids=ids, pixel_values=pictures(), max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert written[:, 9:].tolist() == WRITTEN


# --- The values -------------------------------------------------------------------------------------------------------

ENCODED = {
    "cls": [
        -1.72619282073,
        0.161682033363,
        0.918453025322,
        -0.426703859258,
        -1.72950649483,
        0.162635787035,
        0.907862486198,
        -0.435841200349,
        1.01368120024,
    ],
    "grid": [
        -1.37300138133,
        0.118075738032,
        0.454673172295,
        -0.82592014671,
        -1.70090607416,
        -0.532738336501,
        0.866000969368,
        -0.615836284871,
        1.01213245849,
    ],
}
PROJECTED = {
    "linear": [
        3.94379667979,
        4.96306801351,
        5.20743976616,
        5.61795092348,
        -3.7826832831,
        0.551396900193,
        -0.142628898674,
        0.312743974655,
        4.26135440571,
    ],
    "mlp": [
        0.932698619798,
        1.76635936872,
        -3.45995177251,
        2.81246798109,
        -3.3169995703,
        -2.80957451493,
        0.328759710765,
        3.19406610527,
        2.16986823738,
    ],
    "unshuffle_mlp": [
        -2.06149930248,
        1.47108728725,
        2.05145115263,
        0.678758277832,
        1.15024737021,
        -0.962006580694,
        -0.576206709607,
        0.655844319104,
        1.82651551337,
    ],
}
LOGITS = [
    4.39248703575,
    1.29205775533,
    3.74595000931,
    3.67313922727,
    -2.4335614445,
    0.516747194604,
    -0.559060991698,
    2.82270109042,
    2.68095256734,
]
WRITTEN = [[30, 1, 30, 30], [30, 1, 30, 1]]

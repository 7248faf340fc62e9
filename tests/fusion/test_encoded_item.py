"""Encoded items in the place of raw ones: the same batch, the same numbers, and gradients for the projector."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni.fusion.encoded_item import EncodedItem

PROJECTORS = [
    {"projector": "linear", "output": "cls"},
    {"projector": "mlp", "output": "grid"},
    {"projector": "unshuffle_mlp", "output": "cls+grid", "factor": 2},
]
TEXTS = ["<image> what <image> shape", "how many", "<image> a red circle"]


@pytest.fixture
def shown() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.mark.parametrize("section", PROJECTORS, ids=lambda section: section["projector"])
def test_encoded_items_stand_for_raw_ones(
    make_pair: Callable[..., Any], shown: list[Image.Image], section: dict[str, Any]
) -> None:
    model, processor = make_pair(**section)
    options = {"text": TEXTS, "padding": True, "return_tensors": "pt"}
    raw = processor(images=[shown[:2], [], shown[2:]], **options)
    items = model.model.encode_items("image", pixel_values=raw["pixel_values"])
    assert set(items[0].tokens) == set(section["output"].split("+"))
    for given in (items, [items[:2], [], items[2:]]):
        encoded = processor(images=given, **options)
        assert "pixel_values" not in encoded
        assert torch.equal(encoded["input_ids"], raw["input_ids"])
        with torch.no_grad():
            torch.testing.assert_close(model(**encoded).logits, model(**raw).logits)
            a, b = (model.generate(**inputs, max_new_tokens=4, num_beams=2) for inputs in (encoded, raw))
        assert torch.equal(a, b)


def test_the_projector_learns_the_same_from_encoded_items(
    make_pair: Callable[..., Any], shown: list[Image.Image]
) -> None:
    model, processor = make_pair(projector="unshuffle_mlp", output="cls+grid", factor=2)
    model.model.image_tower.requires_grad_(False)
    inputs = processor(images=shown[:2], text=["<image> what <image> shape"], return_tensors="pt")
    with torch.no_grad():
        items = model.model.encode_items("image", pixel_values=inputs["pixel_values"])
    gradients = []
    for given in (inputs, processor(images=items, text=["<image> what <image> shape"], return_tensors="pt")):
        model.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert any("image_projector" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_items_of_several_shapes_are_projected_by_shape(make_pair: Callable[..., Any]) -> None:
    model, _ = make_pair(projector="mlp", output="grid")
    random = torch.Generator().manual_seed(0)
    width = model.config.modalities["image"]["encoder"].hidden_size
    items = [
        EncodedItem({"grid": torch.randn(rows * columns, width, generator=random)}, (rows, columns))
        for rows, columns in [(2, 2), (1, 3), (2, 2), (4, 1)]
    ]
    with torch.no_grad():
        together = model.model.project("image", items)
        alone = [model.model.project("image", [item])[0] for item in items]
    assert [len(tokens) for tokens in together] == [4, 3, 4, 4]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_mixed_or_foreign_items_are_refused(make_pair: Callable[..., Any], shown: list[Image.Image]) -> None:
    model, processor = make_pair()
    pixel_values = processor(images=shown[:1], text="<image>", return_tensors="pt")["pixel_values"]
    items = model.model.encode_items("image", pixel_values=pixel_values)
    with pytest.raises(
        ValueError, match=r"Of 2 items of modality 'image', 1 are encoded already; expected all or none"
    ):
        processor(images=[items[0], shown[1]], text="<image> <image>", return_tensors="pt")
    with pytest.raises(ValueError, match="found 2 .* and 1"):
        processor(images=items, text="<image> <image>", return_tensors="pt")
    inputs = processor(images=items, text="<image> what", return_tensors="pt")
    with pytest.raises(ValueError, match="came twice"):
        model(**inputs, pixel_values=pixel_values)
    with pytest.raises(ValueError, match=r"Encoded items of \['sound'\]"):
        model(input_ids=inputs["input_ids"], mm_encoder_outputs={"sound": items})

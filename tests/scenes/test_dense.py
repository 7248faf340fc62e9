"""The dense loss: what it asks for, what it leaves open, and what it weighs."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import compile_regions
from torch._dynamo import OptimizedModule

from omni import OmniImageProcessor, OmniVisionConfig, OmniVisionModel, scenes
from omni.data.collate import IGNORED
from omni.scenes.dense import ATTRIBUTES, LOSS_WEIGHTS, NOTHING, PATCH_ATTRIBUTES, DenseModel, DenseScenes


@pytest.fixture
def model() -> DenseModel:
    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return DenseModel(OmniVisionModel(OmniVisionConfig(**tiny, hidden_dropout_prob=0.0)), OmniImageProcessor())


def batch_of(dataset: DenseScenes, count: int) -> dict[str, torch.Tensor]:
    items = [dataset[i] for i in range(count)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def test_regions_can_be_compiled(model: DenseModel) -> None:
    batch = batch_of(DenseScenes("train", 2, OmniImageProcessor()), 2)
    expected = model(**batch)["loss"]
    compiled = compile_regions(model, backend="eager")  # as accelerate does; without a compiler
    assert isinstance(compiled.heads, OptimizedModule)
    assert torch.allclose(compiled(**batch)["loss"], expected)


def test_labels_name_what_covers_each_patch() -> None:
    dataset = DenseScenes("train", 10, OmniImageProcessor(), neutral=0.5)
    for i in range(10):
        item, scene = dataset[i], scenes.sample_scene(i, "train", neutral=0.5)
        owner = torch.from_numpy(scenes.object_map(scene)).ravel()
        for patch in range(196):
            found = item["labels"][:, patch].tolist()
            if owner[patch] < 0:
                assert found == [NOTHING, *[IGNORED] * 5]
                continue
            thing = scene.objects[owner[patch]]
            named = thing.color != scenes.NEUTRAL
            assert found == [
                scenes.SHAPES.index(thing.shape),
                scenes.COLORS.index(thing.color) if named else IGNORED,
                scenes.SIZES.index(thing.size),
                scenes.PATTERNS.index(thing.pattern),
                thing.place,
                IGNORED,
            ]
        weights = item["patch_weights"]
        for thing_index in owner.unique():
            assert weights[owner == thing_index].sum() == pytest.approx(1)
        assert item["scene_labels"].tolist() == [
            scenes.BACKGROUNDS.index(scene.background),
            int(scene.dark),
            len(scene.objects) - 1,
            IGNORED,
        ]


def test_a_share_of_the_pictures_are_characters() -> None:
    dataset = DenseScenes("train", 200, OmniImageProcessor(), characters=0.3)
    characters = [item for item in map(dataset.__getitem__, range(200)) if item["scene_labels"][3] != IGNORED]
    assert 40 < len(characters) < 80
    for item in characters:
        covered = item["labels"][-1] != IGNORED
        assert item["labels"][-1, covered].eq(item["scene_labels"][3]).all()
        assert item["labels"][:-1].eq(IGNORED).all()
        assert item["patch_weights"][covered].sum() == pytest.approx(1)
        assert item["patch_weights"][~covered].eq(0).all()


def test_the_loss_is_what_a_plain_loop_computes(model: DenseModel) -> None:
    """Over every patch and picture one by one, with the pairs that training leaves out taken out of the softmax."""
    batch = batch_of(DenseScenes("train", 6, OmniImageProcessor(), characters=0.4, neutral=0.3), 6)
    assert {int(label) == IGNORED for label in batch["scene_labels"][:, 3]} == {True, False}
    found = model.train()(**batch)["loss"]
    with torch.no_grad():
        encoded = model.encoder((batch["pixel_values"] / 255 - 0.5) / 0.5)
        sizes = [11, 10, 3, 3, 9, 200]
        patch_logits = model.heads["patch"](encoded.grid).split(sizes, -1)
        scene_logits = model.heads["scene"](encoded.cls).split([4, 2, 9, 200], -1)
    expected = weights_of_all = 0.0
    for number, name in enumerate(ATTRIBUTES):
        total, weights = 0.0, 0.0
        for b in range(6):
            if number >= len(PATCH_ATTRIBUTES):
                label = batch["scene_labels"][b, number - len(PATCH_ATTRIBUTES)]
                if label != IGNORED:
                    total += float(F.cross_entropy(scene_logits[number - len(PATCH_ATTRIBUTES)][b], label[None]))
                    weights += 1
                continue
            for patch in range(196):
                label, weight = int(batch["labels"][b, number, patch]), float(batch["patch_weights"][b, patch])
                if label == IGNORED:
                    continue
                scores = patch_logits[number][b, patch].tolist()
                shape, color = batch["labels"][b, :2, patch].tolist()
                for other_shape, other_color in scenes.HELD_OUT_PAIRS:
                    s, c = scenes.SHAPES.index(other_shape), scenes.COLORS.index(other_color)
                    if name == "shape" and c == color:
                        scores[s] = -math.inf
                    if name == "color" and s == shape:
                        scores[c] = -math.inf
                total += weight * (math.log(sum(math.exp(x) for x in scores)) - scores[label])
                weights += weight
        expected += LOSS_WEIGHTS.get(name, 1.0) * total / weights
        weights_of_all += LOSS_WEIGHTS.get(name, 1.0)
    assert float(found) == pytest.approx(expected / weights_of_all, rel=1e-4)


def test_nothing_pushes_a_pair_down_that_training_leaves_out(model: DenseModel) -> None:
    """A cyan circle says nothing about "hexagon", since cyan hexagons are held out; it does say "no square"."""
    labels = torch.full((1, 6, 196), IGNORED)
    labels[0, 0, 7], labels[0, 1, 7] = scenes.SHAPES.index("circle"), scenes.COLORS.index("cyan")
    weights = torch.zeros(1, 196)
    weights[0, 7] = 1.0
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    model.train()(pixels, labels, weights, torch.full((1, 4), IGNORED))["loss"].backward()
    gradient = model.heads["patch"].bias.grad
    assert gradient is not None
    assert gradient[scenes.SHAPES.index("hexagon")] == 0
    assert gradient[scenes.SHAPES.index("square")] > 0
    assert gradient[scenes.SHAPES.index("circle")] < 0


def test_evaluation_sees_every_answer(model: DenseModel) -> None:
    """Held-out pairs have a finite loss where nothing is learnt."""
    batch = batch_of(DenseScenes("pairs", 4, OmniImageProcessor()), 4)
    assert torch.isfinite(model.eval()(**batch)["loss"])

"""Does a model look at the object? Measure the attention on its patches, in scenes with one object.

python examples/attention_mass.py 100     # number of scenes
"""

import sys
from pathlib import Path

import numpy as np

from omni.loading.checkpoint import load
from omni.loading.encoder import load_encoder
from omni.looking.attention import encoder_attention, word_attention
from omni.scenes import object_map, questions, render, sample_scene

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
KINDS = {"shape": 1, "color": 1, "size": 1, "pattern": 1, "where": 1}
scenes = [sample_scene(number, "test", max_objects=1) for number in range(int([*sys.argv, "10"][1]))]
covered = np.array([object_map(scene) >= 0 for scene in scenes])
print(f"{len(scenes)} scenes; the object covers {covered.mean():.3f} of the patches, and gets of the attention:")


def show(name, maps):
    """Print the object's share of maps float[scenes, h, w], its standard error, and its multiple of the object's area."""
    mass = np.array([each[mask].sum() / each.sum() for each, mask in zip(maps, covered, strict=True)])
    print(f"{name:33}{mass.mean():.3f} +- {mass.std() / len(mass) ** 0.5:.3f}{mass.mean() / covered.mean():6.1f} x")


for name in ("vision_tiny", "omni_tiny"):
    encoder = load_encoder(CHECKPOINTS / name, "image")
    for layer in range(1, encoder.model.config.num_hidden_layers + 1):
        found = [encoder_attention(encoder, render(scene), layer) for scene in scenes]
        show(f"{name}, layer {layer}, mean", [each.mean for each in found])
        for head in range(len(found[0].heads)):
            show(f"{name}, layer {layer}, head {head + 1}", [each.heads[head] for each in found])
    show(f"{name}, rollout", [each.rollout for each in found])
model, processor = load(CHECKPOINTS / "omni_tiny")
asked = [(render(scene), question) for scene in scenes for question in questions(scene, scene.seed, weights=KINDS)]
looked = [word_attention(model, processor, [picture], question.text).maps[0].mean(0) for picture, question in asked]
show("omni_tiny, Thinker, 5 questions", np.array(looked).reshape(len(scenes), len(KINDS), 14, 14).mean(1))

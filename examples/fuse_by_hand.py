"""The steps of the fused model by hand: registry, encoder, projector, Thinker, and the shape of every tensor.

python examples/fuse_by_hand.py
"""

from pathlib import Path

import torch

from omni import OmniForConditionalGeneration, OmniProcessor
from omni.registry import get_modality
from omni.vision.pictures import read_picture

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "checkpoints/omni_tiny"
model, processor = OmniForConditionalGeneration.from_pretrained(CHECKPOINT), OmniProcessor.from_pretrained(CHECKPOINT)
image, section, parts = get_modality("image"), model.config.modalities["image"], model.model
text = "<|user|><image>what color is the circle<|assistant|>"
inputs = processor(images=read_picture(HERE / "scene.png"), text=text, return_tensors="pt")

with torch.inference_mode():
    (grid_shape,) = image.grid_shapes(section["encoder"], inputs)
    encoded = parts.image_tower(inputs["pixel_values"])
    tokens = image.read(encoded, num_patches=grid_shape[0] * grid_shape[1])
    projected = parts.image_projector({name: tokens[name] for name in section["output"].split("+")}, grid_shape)
    words = parts.get_input_embeddings()(inputs["input_ids"])
    here = (inputs["input_ids"] == section["token_id"])[..., None]
    placed = words.masked_scatter(here, projected)
    hidden = parts.language_model(inputs_embeds=placed).last_hidden_state
    logits = model.lm_head(hidden)

shown = inputs | tokens | {"projected": projected, "words": words, "placed": placed, "hidden": hidden, "logits": logits}
for name, tensor in shown.items():
    print(f"{name:15} {' x '.join(map(str, tensor.shape))}")
print("tokens of the picture:", int(here.sum()), "planned:", model.config.num_tokens("image", grid_shape))
print("next word:", processor.decode(logits[0, -1].argmax()))
assert torch.allclose(logits, model(**inputs).logits, atol=1e-4)  # the model computes the same

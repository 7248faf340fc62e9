"""Load the encoder, and see the tokens of a picture: one CLS token, and a grid with one token for each patch.

python examples/load_encoder.py
"""

from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModel

import omni  # noqa: F401 - adds omni's models to the Auto classes
from omni.vision.pictures import read_picture

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "checkpoints/vision_tiny"

image_processor = AutoImageProcessor.from_pretrained(CHECKPOINT)
model = AutoModel.from_pretrained(CHECKPOINT)
inputs = image_processor(read_picture(HERE / "scene.png"), return_tensors="pt")
with torch.inference_mode():
    encoded = model(**inputs)
print("pixel_values", tuple(inputs["pixel_values"].shape))
print("cls         ", tuple(encoded.cls.shape))
print("grid        ", tuple(encoded.grid.shape))

# The similarity of each patch to the one in the middle of the heart, from 0 to 9, in the layout of the picture.
side = model.config.grid_size
grid = torch.nn.functional.normalize(encoded.grid[0], dim=-1)  # (196, 128)
alike = (grid @ grid[7 * side + 7]).clamp(0, 0.999).reshape(side, side)
for row in (alike * 10).int().tolist():
    print(" ".join(map(str, row)))

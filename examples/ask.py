"""Ask about a picture with the Auto classes of transformers.

python examples/ask.py examples/scene.png "what color is the circle"
"""

import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import omni  # noqa: F401 - adds omni's models to the Auto classes
from omni.vision.pictures import read_picture

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "checkpoints/omni_tiny"
picture, question = sys.argv[1:] or (HERE / "scene.png", "what color is the circle")

processor = AutoProcessor.from_pretrained(CHECKPOINT)
model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
content = [{"type": "image", "image": read_picture(picture)}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

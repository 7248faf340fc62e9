"""Two pictures in one prompt, and the token plan: which tokens of the prompt stand for which picture.

The shipped checkpoint was trained on prompts with one picture. Train on your own pairs before you trust its answer.

python examples/two_pictures.py
"""

from itertools import groupby
from pathlib import Path

from omni.loading.checkpoint import load
from omni.session import answer
from omni.vision.pictures import read_picture

HERE = Path(__file__).parent

model, processor = load(HERE.parent / "checkpoints/omni_tiny")
pictures = [read_picture(HERE / "scene.png"), read_picture(HERE / "second.png")]

prompt = "first: <image> second: <image> is there a heart in the first picture"
inputs = processor(images=pictures, text=prompt, return_tensors="pt")
start = 0
for is_picture, run in groupby(inputs["input_ids"][0].tolist(), lambda token: token == processor.image_token_id):
    tokens = list(run)
    text = "a picture" if is_picture else repr(processor.decode(tokens))
    print(f"tokens {start:3} to {start + len(tokens) - 1:3}: {text}")
    start += len(tokens)
print("pixel_values", tuple(inputs["pixel_values"].shape))

result = answer(model, processor, pictures, "is there a heart in the first picture")
print(f"{result.tokens_read} tokens read, answer: {result.answer}")

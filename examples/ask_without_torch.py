"""Ask about a picture without torch and transformers, with the graphs of `omni export checkpoints/omni_tiny exported`.

python examples/ask_without_torch.py exported examples/scene.png "what color is the circle"
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps
from tokenizers import Tokenizer

folder, picture, question = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
graphs = {path.stem: InferenceSession(path) for path in folder.glob("*.onnx")}
settings = json.loads((folder / "omni.json").read_text())
tokenizer, look, image = Tokenizer.from_file(f"{folder}/tokenizer.json"), settings["pixels"], settings["image_token"]


def run(name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:  # noqa: D103
    return {o.name: v for o, v in zip(graphs[name].get_outputs(), graphs[name].run(None, inputs), strict=True)}


upright = ImageOps.exif_transpose(Image.open(picture)).convert("RGB").resize(look["size"], look["resample"])
pixels = (np.array(upright) * look["scale"] + look["shift"]).astype(np.float32).transpose(2, 0, 1)[None]
encoded = run("image_encoder", pixel_values=pixels)
tokens = run("image_projector", **{i.name: encoded[i.name] for i in graphs["image_projector"].get_inputs()})["tokens"]
prompt = settings["prompt"].replace(image, image * tokens.shape[1]).replace("{question}", question)
new, mask, answer = np.array([tokenizer.encode(prompt, add_special_tokens=False).ids]), np.ones((1, 0), np.int64), []
past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in graphs["thinker"].get_inputs()[2:]}
while new[0, -1] not in settings["end_token_ids"] and len(answer) < 64:
    embeds, mask = run("embedding", input_ids=new)["inputs_embeds"], np.hstack([mask, np.ones_like(new)])
    embeds[new == settings["image_token_id"]] = tokens[0, : 0 if answer else None]
    read = run("thinker", inputs_embeds=embeds, attention_mask=mask, **past)
    past = {name: read[name.replace("input.", "output.")] for name in past}
    read["logits"][..., settings["image_token_id"]] = -np.inf  # an answer has no pictures
    new = read["logits"][:, -1:].argmax(-1)
    answer.append(new.item())
print(tokenizer.decode(answer).strip())

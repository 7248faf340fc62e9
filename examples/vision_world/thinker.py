"""Make the model that examples/vision_world/names.json begins with: `vision_world`, a new projector and a new Thinker.

    python examples/vision_world/thinker.py runs/world runs/omni_world_start

Its tokens are bytes, which spell, the names of the emoji, each of which is one token, and the words of the questions. The
embedding of a name begins as the mean of what the projector makes of some of its pictures, so that the Thinker has only to
learn to say what it sees.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken

from omni.registry import open_item
from omni.training.answers import build_omni

ENCODER, THINKER, SOME = "checkpoints/vision_world", "examples/vision_world/thinker.json", 8
QUESTIONS = ("what", " is", " it", " written")
IMAGE = {"projector": "linear", "output": "cls", "whitened": True}


def main(folder: Path, output: Path, encoder: str) -> None:
    """Build the model, add the names to its tokens, and measure the whitening and their embeddings."""
    torch.manual_seed(0)
    rows = [json.loads(line) for line in (folder / "asked/names.jsonl").read_text().splitlines()]
    model, processor = build_omni(thinker=THINKER, image={**IMAGE, "encoder": encoder})
    names = sorted({row["answer"] for row in rows})
    processor.tokenizer.add_tokens([AddedToken(name, single_word=True, normalized=False) for name in names])
    processor.tokenizer.add_tokens([AddedToken(word, normalized=False) for word in QUESTIONS])
    model.resize_token_embeddings(len(processor.tokenizer))
    opened, chance, projector = open_item("image"), random.Random(0), model.model.image_projector
    chance.shuffle(rows)
    found = []
    for name in names:
        some = [row["image"] for row in rows if row["answer"] == name][:SOME]
        inputs = processor.preprocessors["image"](
            [opened(folder / "asked" / file) for file in some], return_tensors="pt"
        )
        with torch.no_grad():
            found.append(model.model.image_tower(**inputs).cls)
    projector.whitening["cls"].measure(torch.cat(found)[:, 0])
    with torch.no_grad():
        means = torch.stack([projector({"cls": cls}, (14, 14)).mean((0, 1)) for cls in found])
        tokens = processor.tokenizer.convert_tokens_to_ids(names)
        model.get_input_embeddings().weight[tokens] = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    model.save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ENCODER)

"""Compose a model of a CLIP and a Llama, train its projector with a recipe, and ask.

Both are tiny and random here, so nothing is downloaded, and the answer is noise. With real models the steps are the same.

python examples/compose.py
"""

import tempfile
from pathlib import Path

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from omni.exchange.compose import compose
from omni.loading.checkpoint import load
from omni.session import answer
from omni.training.recipe import Recipe
from omni.training.run import run
from omni.training.tokenizer import train_tokenizer
from omni.vision.pictures import read_picture

HERE = Path(__file__).parent
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

with tempfile.TemporaryDirectory() as folder:
    clip, llama, joined, trained = (f"{folder}/{name}" for name in ("clip", "llama", "joined", "trained"))
    CLIPVisionModel(CLIPVisionConfig(image_size=64, patch_size=16, **SMALL)).save_pretrained(clip)
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(clip)
    tokenizer = train_tokenizer(["what color is the circle"], 300, placeholders={})
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**SMALL, **ids)).save_pretrained(llama)
    tokenizer.save_pretrained(llama)

    composition = compose(clip, llama, projector="unshuffle_mlp")
    print("\n".join(composition.notes), "\nuntrained:", composition.model.config.untrained)
    changes = [f"model.checkpoint={composition.save(joined)}", "model.image=null", "evaluate=null", f"output={trained}"]
    small = ("max_steps=3", "per_device_train_batch_size=4", "dataloader_num_workers=0")
    changes += [f"arguments.{setting}" for setting in small]
    run(Recipe.read(HERE.parent / "configs/train_projector.json", changes))
    said = answer(*load(trained), [read_picture(HERE / "scene.png")], "what color is the circle", max_new_tokens=4)
    print("read", said.tokens_read, "tokens, wrote", said.tokens_written)

"""Use a vision model of transformers in the place of omni's encoder.

Here it is a tiny SigLIP with random weights, so nothing is downloaded. With a real one the steps are the same.

python examples/pretrained_tower.py
"""

import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoTokenizer, SiglipImageProcessorPil, SiglipVisionConfig

from omni import OmniConfig, OmniForConditionalGeneration, OmniProcessor
from omni.vision.pictures import read_picture

HERE = Path(__file__).parent

with tempfile.TemporaryDirectory() as folder:  # in the place of the folder of a pretrained model
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModel.from_config(SiglipVisionConfig(image_size=64, patch_size=16, **small)).save_pretrained(folder)
    tower, tower_config = AutoModel.from_pretrained(folder), AutoConfig.from_pretrained(folder)

tokenizer = AutoTokenizer.from_pretrained(HERE.parent / "checkpoints/omni_tiny")
image = {"encoder": tower_config, "token_id": tokenizer.convert_tokens_to_ids("<image>")}
image |= {"output": "cls+grid", "projector": "mlp"}
thinker = {"model_type": "qwen3", "vocab_size": len(tokenizer), "num_key_value_heads": 4, **small}
model = OmniForConditionalGeneration(OmniConfig(modalities={"image": image}, text_config=thinker))
model.model.image_tower.load_state_dict(tower.state_dict())

size = {"height": 64, "width": 64}
processor = OmniProcessor(SiglipImageProcessorPil(size=size), tokenizer, modalities=model.config.modalities)
inputs = processor(images=read_picture(HERE / "scene.png"), text="<image>what is it", return_tensors="pt")
print("pixel_values", tuple(inputs["pixel_values"].shape), "input_ids", tuple(inputs["input_ids"].shape))
print("projected   ", tuple(model.get_image_features(inputs["pixel_values"]).pooler_output[0].shape))
print("logits      ", tuple(model(**inputs).logits.shape))

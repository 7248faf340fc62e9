"""Generation: tokens a second of the fused model and of transformers' Llava, from prepared inputs to the last token.

All contestants write the same number of tokens, greedily, whatever the tokens say. There are two pairs:

    50 picture tokens     omni_tiny as shipped, which folds 2 x 2 patches into a token; Llava with a CLIP tower of 32 x 32
                          patches, which is less work
    196 picture tokens    both with omni's encoder, a two-layer projector and the same Thinker

In float32 on a CPU, with all weights in bfloat16 on a GPU.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import peers, pictures
from benchmarks.machine import CPU
from benchmarks.measure import Call, Contestant, Race
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration

QUESTION = 6
"""Number of tokens of text after the picture's tokens."""


def races(quick: bool, device: torch.device = CPU) -> Iterator[Race]:
    """One race for each batch size."""
    written, dtype = 8 if quick else 64, torch.float32 if device.type == "cpu" else torch.bfloat16
    config = OmniConfig.from_pretrained(peers.CHECKPOINTS / "omni_tiny")
    for batch in (1, 16):
        build = partial(_build, config, pictures.batch(batch, device, dtype), written)
        contestants = [
            Contestant("Llava, CLIP tower, 50 picture tokens", partial(build, partial(peers.llava, config, False), 50)),
            Contestant(
                "Llava, omni's encoder, 196 picture tokens", partial(build, partial(peers.llava, config, True), 196)
            ),
            Contestant("omni_tiny, 50 picture tokens", partial(build, _shipped, 50), ours=True),
            Contestant(
                "omni, two-layer projector, 196 picture tokens", partial(build, partial(_plain, config), 196), ours=True
            ),
        ]
        title = f"{written} tokens, batch {batch}{', bf16' if dtype == torch.bfloat16 else ''}"
        yield Race(title, contestants, items=batch * written, unit="token")


def _shipped() -> Any:
    return OmniForConditionalGeneration.from_pretrained(peers.CHECKPOINTS / "omni_tiny").eval()


def _plain(config: OmniConfig) -> Any:
    """A fused model of parts that Llava has, too, with random weights."""
    section = {**config.modalities["image"], "output": "grid", "projector": "mlp", "factor": 1}
    section["encoder"] = copy.deepcopy(section["encoder"])
    made = OmniConfig(modalities={"image": section}, text_config=copy.deepcopy(config.text_config))
    return OmniForConditionalGeneration(made).eval()


def _build(config: OmniConfig, pixels: torch.Tensor, written: int, make: Callable[[], Any], pictured: int) -> Call:
    model, image, batch = make().to(pixels), config.modalities["image"]["token_id"], len(pixels)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(image + 1, config.text_config.vocab_size, (batch, QUESTION), generator=generator)
    ids = torch.cat([torch.full((batch, pictured), image), words], dim=1).to(pixels.device)
    settings = {
        "do_sample": False,
        "min_new_tokens": written,
        "max_new_tokens": written,
        "eos_token_id": config.text_config.eos_token_id,
        "pad_token_id": config.text_config.pad_token_id,
    }
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def write() -> torch.Tensor:
        output: torch.Tensor = model.generate(**inputs, **settings)
        assert output.shape == (batch, pictured + QUESTION + written)
        return output

    return write

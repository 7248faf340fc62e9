"""Teaching a frozen language model to see: a training step of the projector, in answers a second.

The language model has the shape of SmolLM2-135M and random weights, in bfloat16 if this processor multiplies it faster.
Four pictures are asked twelve questions each.

    omni                         what `omni teach` does: the questions of a picture are branches of one sequence
    Llava, a row per picture     the questions are turns of one conversation, as in LLaVA's own data
    Llava, a row per question    each question has the picture in front of it

Llava is transformers' own. Its CLIP tower reads 49 patches, omni's encoder 196; both give 50 tokens a picture. Turns of a
conversation see each other, branches do not, so the losses differ. All learn the same answers, and AdamW steps the
projector alone.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks import peers
from benchmarks.machine import CPU
from benchmarks.measure import Call, Contestant, Race
from omni.data.collate import ConversationCollator
from omni.data.conversations import Example, Message
from omni.embedding.engine import bfloat16_pays
from omni.fusion import acceleration
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.scenes.recipe import Scenes
from omni.training.answers import before_labels
from omni.training.parts import FrozenParts, freeze, learn_in_float32

QUESTIONS = 12
"""Of each picture."""

SMOL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
"""The shape of SmolLM2-135M."""


def races(quick: bool, device: torch.device = CPU) -> Iterator[Race]:
    """One race."""
    assert device.type == "cpu"
    pictures = 1 if quick else 4
    config, processor = _parts(quick)
    examples = [Scenes(count=pictures, questions=QUESTIONS).conversations()[index] for index in range(pictures)]
    turns = [Example(each.items, [_one_conversation(each.conversations)]) for each in examples]
    apart = [Example(each.items, [chat]) for each in examples for chat in each.conversations]
    build = partial(_step, config, processor)
    contestants = [
        Contestant("Llava, a row per picture", partial(build, partial(peers.llava, config, False), turns)),
        Contestant("Llava, a row per question", partial(build, partial(peers.llava, config, False), apart)),
        Contestant("omni", partial(build, partial(OmniForConditionalGeneration, config), examples), ours=True),
    ]
    yield Race(f"step, {pictures} pictures", contestants, items=pictures * QUESTIONS, unit="answer")


def _one_conversation(conversations: list[list[Message]]) -> list[Message]:
    """All turns as one conversation. The picture is in the first alone."""
    first, *others = conversations
    later = [
        {**message, "content": [block for block in message["content"] if block["type"] == "text"]}
        for conversation in others
        for message in conversation
    ]
    return [*first, *later]


def _parts(quick: bool) -> tuple[OmniConfig, OmniProcessor]:
    """The configuration of the model, and the processor of omni_tiny, whose tokens are fewer."""
    shipped = OmniConfig.from_pretrained(peers.CHECKPOINTS / "omni_tiny")
    processor = OmniProcessor.from_pretrained(peers.CHECKPOINTS / "omni_tiny")
    text = LlamaConfig(**{**SMOL, **({"num_hidden_layers": 2} if quick else {})})
    return OmniConfig(modalities={"image": shipped.modalities["image"]}, text_config=text), processor


def _step(config: OmniConfig, processor: OmniProcessor, make: Callable[[], Any], examples: list[Example]) -> Call:
    dtype = torch.bfloat16 if bfloat16_pays() else torch.float32
    model = make().to(dtype).train()
    freeze(model, ["^(?!.*projector)"])
    learn_in_float32(model)
    FrozenParts(model)
    batch = ConversationCollator(processor)(examples)
    ours = isinstance(model, OmniForConditionalGeneration)
    if ours:
        batch["logits_to_keep"] = before_labels(batch["labels"])
    else:  # its rows are plain conversations, with the usual mask
        batch["attention_mask"] = (batch["input_ids"] != processor.tokenizer.pad_token_id).long()
        del batch["position_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    speed = acceleration.current() if ours else acceleration.Acceleration()

    def step() -> torch.Tensor:
        with speed.training(model, torch.device("cpu"), torch.float32):
            with torch.autocast("cpu", torch.bfloat16, enabled=not ours and dtype == torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step

"""The language test: does the language model of a fused model still write as it does alone?

The test needs a checkpoint that names its language model (`parts_from`). That one, alone, and the fused model answer the
same questions without items, and read the same text.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from transformers import AutoModelForCausalLM

from omni.data.conversations import ask
from omni.fusion.parts import grow_vocabulary
from omni.questions import write_prompts

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three fruits.",
    "What do bees make?",
    "Why is the sky blue?",
    "Give me a short piece of advice for a long journey.",
    "What is two plus three?",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "Finish the sentence: Once upon a time there was",
)
LONGEST = 32
"""The number of tokens of an answer that are compared."""
PASSAGE = (
    "The river rises in the hills behind the village, where the snow lies until late in April. In spring it is loud and "
    "brown, and carries branches and sometimes a whole tree down to the mill. By June it has become so shallow that "
    "children cross it without wetting their knees. My grandfather said that the mill was older than the church, and that "
    "its wheel had stopped only twice: once in the great frost, when the ice held it fast for nine weeks, and once on the "
    "day when the miller's daughter was married. Now a small museum is in the house. It is open on Sundays. Visitors may "
    "turn a handle to see how the stones ground the wheat, and for a coin they get a bag of flour, which is made "
    "elsewhere. Nobody minds. They buy it because of the smell of the wood, the sound of the water below the floor, and "
    "the thought that bread was once a thing that a whole valley worked for."
)


class Spoken(BaseModel):
    """A question, and the first `LONGEST` tokens of the answers of the language model alone and of the fused model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    alone: str
    fused: str


class LanguageTest(BaseModel):
    """How the language model writes alone, and in the fused model.

    Attributes:
        n, same: number of questions, and of those with equal greedy answers.
        perplexity_alone, perplexity: of `PASSAGE`.
        answers: to the questions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    same: int
    perplexity_alone: float
    perplexity: float
    answers: list[Spoken]


@torch.inference_mode()
def language_test(model: Any, processor: Any) -> LanguageTest | None:
    """The language test of a fused model; None if it does not name its language model."""
    place = (model.config.parts_from or {}).get("language_model")
    if place is None:
        return None
    dtype = next(model.model.language_model.parameters()).dtype
    alone = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, trust_remote_code=False)
    alone = alone.eval().to(model.device)
    grow_vocabulary(alone, model.config.text_config.vocab_size)
    inputs = write_prompts(processor, [ask(question, items=()) for question in QUESTIONS]).to(model.device)
    said = []
    for each in (alone, model):
        written = each.generate(
            **inputs, generation_config=model.generation_config, max_new_tokens=LONGEST, do_sample=False
        )
        texts = processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        said.append([text.strip() for text in texts])
    answers = [
        Spoken(question=question, alone=first, fused=second)
        for question, first, second in zip(QUESTIONS, *said, strict=True)
    ]
    return LanguageTest(
        n=len(answers),
        same=sum(each.alone == each.fused for each in answers),
        perplexity_alone=_perplexity(alone, processor.tokenizer),
        perplexity=_perplexity(model, processor.tokenizer),
        answers=answers,
    )


def _perplexity(model: Any, tokenizer: Any) -> float:
    ids = tokenizer(PASSAGE, return_tensors="pt")["input_ids"].to(model.device)
    logits = model(input_ids=ids).logits[0, :-1].float()
    return math.exp(F.cross_entropy(logits, ids[0, 1:]).item())

"""Ask about pictures: a checkpoint folder, pictures and a question in, words out. What `omni ask` calls.

    model, processor = load("checkpoints/omni_tiny")
    print(answer(model, processor, [read_picture("photo.jpg")], "what color is the circle?").answer)

Two things can be wrong with what somebody asks for, and each has its error: a checkpoint that cannot answer
(`CheckpointError`), and a question that cannot be asked (`QuestionError`). Everything else that is raised is a bug.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from transformers import BatchFeature

from omni.data.conversations import Message, ask
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.loading import CheckpointError


class QuestionError(ValueError):
    """A question that cannot be asked; the message is one sentence."""


class Answer(BaseModel):
    """What a model said.

    Attributes:
        answer: its words.
        question: what it was asked, without spaces around.
        checkpoint: the folder that the model came from.
        complete: whether the model ended by itself; False if it was stopped at `max_new_tokens`.
        tokens_read, tokens_written: length of the prompt, pictures included, and of the answer.
        seconds: wall-clock time by what it was spent on.
    """

    model_config = ConfigDict(frozen=True)

    answer: str
    question: str
    checkpoint: str
    complete: bool
    tokens_read: int
    tokens_written: int
    seconds: dict[str, float]


def check_question(question: str) -> str:
    """The question without spaces around.

    Raises:
        QuestionError: nothing is left, or it is no text that can be written down (broken bytes of a terminal).
    """
    question = question.strip()
    if not question:
        raise QuestionError("The question is empty; ask something about the picture.")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise QuestionError(f"The question {question!r} is not valid Unicode text; type it again.") from error
    return question


def load(checkpoint: str | Path) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """Load a fused model and its processor from a folder; nothing is fetched from anywhere.

    Raises:
        CheckpointError: no such folder, another kind of model in it, a file of it missing, damaged or a stranger's, or
            parts that were never trained.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"The checkpoint {str(folder)!r} {found}; expected the folder of a saved fused model.")
    values = {path.name: _read_object(path) for path in sorted(folder.glob("*.json"))}
    kind = values["config.json"].get("model_type")
    if kind != OmniConfig.model_type:
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} holds a model of type {kind!r}, which does not answer questions; expected "
            f"a fused model, of type {OmniConfig.model_type!r}."
        )
    try:
        processor = OmniProcessor.from_pretrained(folder)
        model = OmniForConditionalGeneration.from_pretrained(folder)
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights in {str(folder)!r} are cut off or damaged ({error}); get the file again."
        ) from error
    except (ValueError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"The checkpoint {str(folder)!r} cannot be loaded: {error}") from error
    if model.config.untrained:
        raise CheckpointError(
            f"In the checkpoint {str(folder)!r} {', '.join(model.config.untrained)} is untrained, so what it would say "
            "means nothing; train it first."
        )
    return model, processor


def _read_object(path: Path) -> dict[str, object]:
    """A JSON file of a checkpoint; transformers passes over some that are cut off, or names another cause."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error}); get the checkpoint again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(path)!r} should hold a JSON object, found a {type(values).__name__}.")
    return values


def make_prompts(processor: OmniProcessor, asked: Sequence[tuple[str, Sequence[Image.Image]]]) -> BatchFeature:
    """A batch of questions about pictures, ready for `generate`."""
    return write_prompts(processor, [ask(question, images=pictures) for question, pictures in asked])


def write_prompts(processor: OmniProcessor, conversations: Sequence[list[Message]]) -> BatchFeature:
    """A batch of chats that end with a question, ready for `generate`; placeholders in their text are plain text."""
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
        processor_kwargs={"padding": True, "padding_side": "left"},  # answers go on from the last token
    )


@torch.inference_mode()
def answer(
    model: OmniForConditionalGeneration,
    processor: OmniProcessor,
    pictures: Sequence[Image.Image],
    question: str,
    max_new_tokens: int = 192,
) -> Answer:
    """Ask one question about pictures; the answer is greedy, so the same every time.

    Args:
        model, processor: as `load` returns them.
        pictures: in the order in which the question speaks of them; see `omni.data.pictures.read_picture`.
        question: any text. Words in it that look like control tokens, such as "<image>", are read as plain text.
        max_new_tokens: where to stop a model that does not end by itself.

    Raises:
        QuestionError: an empty question, or more pictures and words than the model can read.
    """
    start = time.perf_counter()
    question = check_question(question)
    inputs = make_prompts(processor, [(question, pictures)]).to(model.device)
    read = inputs["input_ids"].shape[1]
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    if limit is not None and read + max_new_tokens > limit:
        raise QuestionError(
            f"The question and its {len(pictures)} pictures are {read} tokens, with no room for an answer "
            f"of {max_new_tokens} in the {limit} that the model takes; pass fewer pictures or a smaller max_new_tokens."
        )
    prepared = time.perf_counter()
    written = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, read:]
    return Answer(
        answer=processor.decode(written, skip_special_tokens=True).strip(),
        question=question,
        checkpoint=str(model.config.name_or_path),
        complete=_ended(model, written),
        tokens_read=read,
        tokens_written=len(written),
        seconds={
            "preparing": round(prepared - start, 3),
            "generating": round(time.perf_counter() - prepared, 3),
        },
    )


def _ended(model: OmniForConditionalGeneration, written: torch.Tensor) -> bool:
    """Whether the last token is an end-of-text."""
    ends = model.generation_config.eos_token_id
    return int(written[-1]) in (ends if isinstance(ends, list) else [ends])

"""Ask about pictures and sounds: a checkpoint folder, items and a question in, words out. What `omni ask` calls.

    model, processor = load("checkpoints/omni_tiny")
    print(answer(model, processor, ["photo.jpg"], "what color is the circle?").answer)

Two things can be wrong with what somebody asks for, and each has its error: a checkpoint that cannot answer
(`CheckpointError`), and a question that cannot be asked (`QuestionError`). Everything else that is raised is a bug.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import BatchFeature, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from omni.data.conversations import Message, ask
from omni.fusion import acceleration
from omni.fusion.encoded_item import EncodedItem
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OldTransformers, OmniProcessor
from omni.fusion.signature import CACHE
from omni.items import Item, expect_known, nouns, read_items
from omni.knowing.confidence import Certainty
from omni.knowing.familiarity import Familiar
from omni.modality import ItemError
from omni.registry import get_modality


class QuestionError(ValueError):
    """A question that cannot be asked; the message is one sentence."""


class Answer(BaseModel):
    """What a model said.

    Attributes:
        answer: its words.
        question: what it was asked, without spaces around.
        checkpoint: the folder that the model came from.
        complete: whether the model ended by itself; False if it was stopped at `max_new_tokens`.
        tokens_read, tokens_written: length of the prompt, items included, and of the answer.
        seconds: wall-clock time by what it was spent on: preparing the prompt, encoding the items, reading the prompt
            (to the first token) and writing the rest.
        confidence: the probability that the answer is right; None where the checkpoint does not know it.
        familiar: whether items and question are like those of training; None where the checkpoint does not know it.
    """

    model_config = ConfigDict(frozen=True)

    answer: str
    question: str
    checkpoint: str
    complete: bool
    tokens_read: int
    tokens_written: int
    seconds: dict[str, float]
    confidence: float | None = None
    familiar: Familiar | None = None


def check_question(question: str, in_words: bool = True) -> str:
    """The question without spaces around.

    Args:
        question: any text.
        in_words: whether something must be left; not where an item is the question.

    Raises:
        QuestionError: nothing is left, or it is no text that can be written down (broken bytes of a terminal).
    """
    question = question.strip()
    if not question and in_words:
        raise QuestionError("The question is empty; ask something.")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise QuestionError(f"The question {question!r} is not valid Unicode text; type it again.") from error
    return question


def make_prompts(processor: OmniProcessor, asked: Sequence[tuple[str, Sequence[Any]]]) -> BatchFeature:
    """A batch of questions about items, ready for `generate`; an item may be a file, see `read_item`."""
    return write_prompts(processor, [ask(question, items=read_items(items)) for question, items in asked])


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


class _Clock(BaseStreamer):
    """Notes when the first token of an answer is there, and hands on what `generate` reads and writes."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.puts, self.first = streamer, 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # before them comes the prompt
            self.first = time.perf_counter()
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


class _Tokens(BaseStreamer):
    """Tokens from the thread that writes an answer to the one that waits: the prompt's, then one by one, then None."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | None] = SimpleQueue()
        self.wanted = True

    def put(self, value: torch.Tensor) -> None:
        if not self.wanted:
            raise InterruptedError("Nobody listens any more.")
        self.queue.put(value.flatten().tolist())

    def end(self) -> None:
        self.queue.put(None)


class Session:
    """Questions about the same items. They are encoded once, and what the model has read of them it does not read again.

    Every question is answered as if it were the first; the answers are greedy, so the same every time.

    Args:
        model, processor: as `load` returns them.
        items: pictures, sounds or their files, in the order in which questions speak of them; see `omni.items.read_item`.

    Raises:
        QuestionError: an item that the model has no encoder for.
        ItemError: a file that cannot be read.
    """

    def __init__(self, model: OmniForConditionalGeneration, processor: OmniProcessor, items: Sequence[Any]) -> None:
        self.model, self.processor = model, processor
        self._items = read_items(items)  # from the first question on their values are `EncodedItem`s
        try:
            expect_known(self._items, model.config.modalities)
        except ItemError as error:
            raise QuestionError(str(error)) from error
        self._cache: Any = None
        self._read: list[int] = []  # the tokens in the cache

    @torch.inference_mode()
    def ask(self, question: str, max_new_tokens: int = 192, streamer: Any = None) -> Answer:
        """Ask one question.

        Args:
            question: any text. Words in it that look like control tokens, such as "<image>", are read as plain text. It may
                be empty where an item asks: see `asked_by` of `OmniProcessor`.
            max_new_tokens: where to stop a model that does not end by itself.
            streamer: one of transformers' streamers, which gets the answer while it is written; see `stream`, too.

        Raises:
            QuestionError: an empty question, or more items and words than the model can read.
        """
        start = time.perf_counter()
        question = check_question(question, in_words=not self.asked_by_items)
        try:
            inputs = dict(write_prompts(self.processor, [ask(question, items=self._items)]).to(self.model.device))
        except OldTransformers as error:
            raise QuestionError(str(error)) from error
        ids = inputs["input_ids"][0].tolist()
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise QuestionError(
                f"The question with {nouns(self._items)} is {len(ids)} tokens, with no room for an answer of "
                f"{max_new_tokens} in the {limit} that the model takes; pass fewer of them or a smaller max_new_tokens."
            )
        prepared = time.perf_counter()
        self._encode(inputs)
        encoded = time.perf_counter()
        if self._take_back(ids):
            inputs.pop("mm_encoder_outputs", None)  # all items have been read
        self._read = []  # until it is known again: whatever interrupts may leave the cache half filled
        clock, certainty, known = _Clock(streamer), Certainty(), self.model.familiarity
        greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
        noted = {} if known is None else {"logits_processor": LogitsProcessorList([certainty])}
        output = self.model.generate(
            **inputs, **{CACHE: self._cache}, **noted, generation_config=greedy, streamer=clock
        )[0]
        ended = time.perf_counter()
        self._read = output[: self._cache.get_seq_length()].tolist()
        written = output[len(ids) :]
        return Answer(
            answer=self._decode(written),
            question=question,
            checkpoint=str(self.model.config.name_or_path),
            complete=int(written[-1]) in self._ends,
            tokens_read=len(ids),
            tokens_written=len(written),
            seconds={
                "preparing": round(prepared - start, 4),
                "encoding": round(encoded - prepared, 4),
                "reading": round(clock.first - encoded, 4),
                "writing": round(ended - clock.first, 4),
            },
            confidence=known and known.confidence(certainty.of(written[None], self._ends)[0]),
            familiar=known and known.judge(self._items, self.processor.tokenizer, question),
        )

    def stream(self, question: str, max_new_tokens: int = 192) -> Iterator[Answer]:
        """Ask one question, and get its answer while it is written; who stops listening stops the writing.

        Yields:
            What there is of the answer whenever it has grown, with `complete` False and no `seconds`; at last what `ask`
            returns.

        Raises:
            QuestionError: see `ask`.
        """
        tokens, written, said = _Tokens(), [], ""
        with ThreadPoolExecutor(1) as writer:
            asked = writer.submit(self.ask, question, max_new_tokens, tokens)
            asked.add_done_callback(lambda _: tokens.end())  # also if nothing is generated
            try:
                given = iter(tokens.queue.get, None)
                tokens_read = len(next(given, ()))
                for token in given:
                    written += token
                    text = self._decode(written).rstrip("\ufffd")  # of some letters a token is a part
                    if text != said:
                        said = text
                        yield Answer(
                            answer=text,
                            question=question.strip(),
                            checkpoint=str(self.model.config.name_or_path),
                            complete=False,
                            tokens_read=tokens_read,
                            tokens_written=len(written),
                            seconds={},
                        )
            finally:
                tokens.wanted = False
            yield asked.result()

    def _decode(self, written: Any) -> str:
        return self.processor.decode(written, skip_special_tokens=True).strip()

    @property
    def _ends(self) -> list[int]:
        """The tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    @property
    def count(self) -> int:
        """How many items there are."""
        return len(self._items)

    @property
    def asked_by_items(self) -> bool:
        """Whether items ask, so that nothing has to be typed."""
        return bool(self.processor.asked_by) and {*self.processor.asked_by} <= {item.modality for item in self._items}

    @property
    def items(self) -> Sequence[Item]:
        """The items; from the first question on each is an `EncodedItem`."""
        return self._items

    def _encode(self, inputs: dict[str, Any]) -> None:
        """Have what the encoders say stand in the place of their inputs."""
        encoded: dict[str, list[EncodedItem]] = {}
        for name in self.model.config.modalities:
            if given := {key: inputs.pop(key) for key in get_modality(name).inputs if key in inputs}:
                with acceleration.current().encoding():
                    encoded[name] = self.model.model.encode_items(name, **given)
        if encoded:
            inputs["mm_encoder_outputs"] = encoded
            waiting = {name: iter(items) for name, items in encoded.items()}
            self._items = [Item(name, next(waiting[name])) for name, _ in self._items]

    def _take_back(self, ids: list[int]) -> bool:
        """Leave in the cache what a new prompt begins with too, if that is all of its items; else start anew."""
        shared = 0
        for old, new in zip(self._read, ids[:-1], strict=False):  # one token at least is left to be read
            if old != new:
                break
            shared += 1
        placeholders = {section["token_id"] for section in self.model.config.modalities.values()}
        if shared and _can_be_cut(self._cache) and placeholders.isdisjoint(ids[shared:]):
            if shared < len(self._read):
                self._cache.crop(shared - len(self._read))
            return True
        self._cache = acceleration.current().cache(self.model.config.text_config)
        return False


def answer(
    model: OmniForConditionalGeneration,
    processor: OmniProcessor,
    items: Sequence[Any],
    question: str,
    max_new_tokens: int = 192,
) -> Answer:
    """Ask one question about items or their files; for more than one about the same, see `Session`."""
    return Session(model, processor, items).ask(question, max_new_tokens)


def _can_be_cut(cache: Any) -> bool:
    """Whether tokens can be taken off its end: sliding windows and states have lost what stood before them."""
    return all(isinstance(layer, DynamicLayer) and type(layer).crop is DynamicLayer.crop for layer in cache.layers)

"""Ask about items: a model, items and a question in, an answer out. `omni ask` uses this.

    model, processor = load("checkpoints/omni_tiny")
    print(answer(model, processor, ["photo.jpg"], "what color is the circle?").answer)

Users' mistakes raise `CheckpointError` (a checkpoint that cannot answer), `QuestionError` (a question that cannot be asked)
or `ItemError` (a file that cannot be read). Any other error is a bug.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from omni.data.conversations import ask
from omni.fusion import acceleration
from omni.fusion.encoded_item import EncodedItem
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.prefix import Prefix
from omni.fusion.processing_omni import OmniProcessor
from omni.fusion.signature import CACHE
from omni.items import Item, expect_known, nouns, read_items
from omni.knowing.confidence import Certainty
from omni.modality import ItemError
from omni.questions import Answer, QuestionError, check_question, expect_room, write_prompts
from omni.registry import get_modality
from omni.streaming import Clock, stream


class Session:
    """Questions about the same items. Items are encoded once, and the model reads the shared start of the prompts once.

    Every question is answered as if it were the first. Answers are greedy, so they are the same every time.

    Args:
        model, processor: as `load` returns them.
        items: items or files, in the order in which questions refer to them; see `omni.items.read_item`.

    Raises:
        QuestionError: the model has no encoder for an item.
        ItemError: a file cannot be read.
    """

    def __init__(self, model: OmniForConditionalGeneration, processor: OmniProcessor, items: Sequence[Any]) -> None:
        self.model, self.processor = model, processor
        self._items = read_items(items)  # after the first question, their values are `EncodedItem`s
        try:
            expect_known(self._items, model.config.modalities)
        except ItemError as error:
            raise QuestionError(str(error)) from error
        self._prefix = Prefix(model.config)

    @torch.inference_mode()
    def ask(self, question: str, max_new_tokens: int = 192, streamer: Any = None) -> Answer:
        """Ask one question.

        Args:
            question: any text. Control tokens in it, such as "<image>", are read as plain text. It may be empty if an item
                asks: see `asked_by` of `OmniProcessor`.
            max_new_tokens: the largest length of the answer.
            streamer: one of transformers' streamers, which gets the answer while it is written; see also `stream`.

        Raises:
            QuestionError: the question is empty, or question and items are longer than the model takes.
        """
        clock, certainty, known = Clock(streamer), Certainty(), self.model.familiarity
        question = check_question(question, in_words=not self.asked_by_items)
        inputs = dict(write_prompts(self.processor, [ask(question, items=self._items)]).to(self.model.device))
        ids = inputs["input_ids"][0].tolist()
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        expect_room(len(ids), max_new_tokens, limit, self._items)
        clock.note("preparing")
        self._encode(inputs)
        clock.note("encoding")
        if self._prefix.share(ids):
            inputs.pop("mm_encoder_outputs", None)  # all items have been read
        inputs[CACHE] = self._prefix.cache
        greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
        noted = {} if known is None else {"logits_processor": LogitsProcessorList([certainty])}
        output = self.model.generate(**inputs, **noted, generation_config=greedy, streamer=clock)[0]
        clock.note("writing")
        self._prefix.note(output.tolist())
        written, ends = output[len(ids) :], self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return Answer(
            answer=self._decode(written),
            question=question,
            checkpoint=str(self.model.config.name_or_path),
            complete=int(written[-1]) in ends,
            tokens_read=len(ids),
            tokens_written=len(written),
            seconds=clock.seconds,
            confidence=known and known.confidence(certainty.of(written[None], ends)[0]),
            familiar=known and known.judge(self._items, self.processor.tokenizer, question),
        )

    def stream(self, question: str, max_new_tokens: int = 192) -> Iterator[Answer]:
        """Ask one question, and yield its answer while it is written. If the iterator is closed, writing stops.

        Yields:
            The beginning of the answer each time it has grown, with `complete` False and no `seconds`; finally the answer
            that `ask` returns.

        Raises:
            QuestionError: see `ask`.
        """
        checkpoint = str(self.model.config.name_or_path)
        return stream(lambda to: self.ask(question, max_new_tokens, to), self._decode, question.strip(), checkpoint)

    def _decode(self, written: Any) -> str:
        return self.processor.decode(written, skip_special_tokens=True).strip()

    def __repr__(self) -> str:
        return f"Session({nouns(self._items) or 'no items'})"

    @property
    def asked_by_items(self) -> bool:
        """Whether items ask, so that the question may be empty."""
        return bool(self.processor.asked_by) and {*self.processor.asked_by} <= {item.modality for item in self._items}

    @property
    def items(self) -> Sequence[Item]:
        """The items. After the first question, their values are `EncodedItem`s."""
        return self._items

    def _encode(self, inputs: dict[str, Any]) -> None:
        """Encode the items, and replace the encoders' inputs by the result."""
        encoded: dict[str, list[EncodedItem]] = {}
        for name in self.model.config.modalities:
            if given := {key: inputs.pop(key) for key in get_modality(name).inputs if key in inputs}:
                with acceleration.current().encoding():
                    encoded[name] = self.model.model.encode_items(name, **given)
        if encoded:
            inputs["mm_encoder_outputs"] = encoded
            waiting = {name: iter(items) for name, items in encoded.items()}
            self._items = [Item(name, next(waiting[name])) for name, _ in self._items]


def answer(
    model: OmniForConditionalGeneration,
    processor: OmniProcessor,
    items: Sequence[Any],
    question: str,
    max_new_tokens: int = 192,
) -> Answer:
    """Ask one question about items or files. For several questions about the same items, use `Session`."""
    return Session(model, processor, items).ask(question, max_new_tokens)

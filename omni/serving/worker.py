"""One request after another through the model, in a thread of its own, until it is answered or its client is gone.

    pictures -> tokens of the encoder -> prompt -> `generate` -> writing.py

Pictures are opened one after the other, so that of the largest there is one in memory. What was asked too much is
refused as early as it can be known: pixels and tokens of pictures before one is opened, text before it becomes tokens.
"""

import asyncio
import copy
import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, LogitsProcessorList
from transformers.processing_utils import ProcessorMixin

from omni.fusion.encoded_item import EncodedItem
from omni.registry import ItemError, get_modality

from .requests import MAX_PIXELS, Chat, Completion, Conversation, Part, Request, RequestError, count_pixels
from .writing import Job, LeftError, Scores, StoppedError, Writing

MAX_WAITING = 64
"""Requests in line."""
USUAL_LENGTH = 1024
"""Tokens of an answer at most, where neither request nor checkpoint say."""
BYTES = 16
"""Of text for each token that the model takes, at most; words are shorter."""
MAX_TEXT = 1_000_000
"""Bytes of text of a request at most; to become tokens each takes two hundred bytes of memory."""
LONGEST = 65_536
"""Tokens of prompt and answer where the model's configuration names no limit."""
COLDEST = 1e-3
"""A temperature below it is none."""
BLANK = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg=="
)
"""A picture of one pixel."""
PROBE = "A system message?"


FAILED = "The server failed at this request; its log says why."


class FailedError(RequestError):
    """A request at which the server failed."""

    status = 500


class BusyError(RequestError):
    """More requests in line than are kept."""

    status = 503


class Worker:
    """The thread, the model and its processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.limit: int = getattr(model.config.text_config, "max_position_embeddings", None) or LONGEST
        self._ends = {*_listed(model.generation_config.eos_token_id)}
        self._line: set[Job] = set()
        self._thread = ThreadPoolExecutor(1, "worker")
        self._takes_system = self._shows(PROBE)

    def take(self, request: Request) -> Job:
        """Put a request in line.

        Raises:
            BusyError: too many are waiting.
        """
        if sum(job.wanted for job in list(self._line)) >= MAX_WAITING:
            raise BusyError(f"{MAX_WAITING} requests are waiting already; try again in a moment.")
        job = Job(request, asyncio.get_running_loop())
        self._line.add(job)
        self._thread.submit(self._do, job).add_done_callback(lambda _: self._line.discard(job))
        return job

    def close(self) -> None:
        """Leave everything that is in line."""
        for job in list(self._line):
            job.wanted = False
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _do(self, job: Job) -> None:
        try:
            self._answer(job)
        except LeftError:
            pass
        except RequestError as error:
            job.tell(error)
        except Exception:
            logging.getLogger("uvicorn.error").exception("A request failed.")
            job.tell(FailedError(FAILED))

    def try_out(self) -> None:
        """Answer a question about a picture, if the model takes pictures; raises what stands in the way."""
        content: list[dict[str, Any]] = [{"type": "text", "text": "?"}]
        if "image" in self.processor.preprocessors:
            content = [{"type": "image_url", "image_url": {"url": BLANK}}, *content]
        chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        self._answer(Job(Chat.model_validate(chat)))

    @torch.inference_mode()
    def _answer(self, job: Job) -> None:
        job.check_wanted()
        request = job.request
        self._check_length(request)
        items = [self._encode(job, where, part) for where, part in self._pictures(request)]
        inputs = self._prompt(request, items)
        read = inputs["input_ids"].shape[1]
        if not 0 < read < self.limit:
            raise self._too_long(read) if read else RequestError("The prompt is empty; write something.")
        writing = Writing(job, self.processor.tokenizer, self._ends)
        with torch.random.fork_rng(enabled=request.seed is not None), suppress(StoppedError):
            if request.seed is not None:
                torch.manual_seed(request.seed)
            self.model.generate(
                **inputs,
                generation_config=self._config(request, self.limit - read),
                logits_processor=LogitsProcessorList([Scores(request, writing, read, self.model)]),
                streamer=writing,
            )
        writing.finish(read)

    def _config(self, request: Request, room: int) -> GenerationConfig:
        """How to generate: as the checkpoint says, then as the request says, to the end of the room at most."""
        config: GenerationConfig = copy.deepcopy(self.model.generation_config)
        for name, value in request.generation_config.model_dump(exclude_none=True).items():
            setattr(config, name, value)
        if request.top_p is not None:
            config.top_p = request.top_p
            config.do_sample = config.do_sample or request.top_p < 1
        if request.temperature is not None:
            config.do_sample = request.temperature >= COLDEST
            config.temperature = request.temperature if config.do_sample else None
        config.max_new_tokens = min(request.limit or config.max_new_tokens or USUAL_LENGTH, room)
        return config

    # --- the prompt ---------------------------------------------------------------------------------------------------

    def _check_length(self, request: Request) -> None:
        """Refuse what has far more text than the model takes, before it is made tokens of."""
        texts = [request.prompt[0]] if isinstance(request, Completion) else []
        if isinstance(request, Conversation):
            texts = [part.text or "" for message in request.turns() for part in message.content]
        length, most = sum(len(text.encode()) for text in texts), min(BYTES * self.limit, MAX_TEXT)
        if length > most:
            raise RequestError(
                f"The text has {length:,} bytes, expected at most {most:,} for the {self.limit:,} tokens that the model "
                "takes; send a shorter text."
            )

    def _pictures(self, request: Request) -> list[tuple[str, Part]]:
        """The pictures of a request, of which the sizes were checked and nothing decoded."""
        pictures = list(request.pictures()) if isinstance(request, Conversation) else []
        if not pictures:
            return []
        if "image" not in self.processor.preprocessors:
            raise RequestError(f"This model takes no pictures, found one in {pictures[0][0]}; leave it out.")
        tokens = sum(
            self.processor._get_num_multimodal_tokens(image_sizes=[(1, 1)] * len(pictures))["num_image_tokens"]
        )
        if tokens >= self.limit:
            raise self._too_long(tokens)
        pixels = sum(count_pixels(_data(where, part)) for where, part in pictures)
        if pixels > MAX_PIXELS:
            raise RequestError(
                f"The pictures have {pixels:,} pixels together, expected at most {MAX_PIXELS:,}; scale them down first."
            )
        return pictures

    def _encode(self, job: Job, where: str, part: Part) -> EncodedItem:
        """A picture as the encoder leaves it."""
        job.check_wanted()
        image = get_modality("image")
        assert image.open is not None
        try:
            picture = image.open(_data(where, part))
        except ItemError as error:
            raise RequestError(f"The picture in {where} cannot be used: {error}") from error
        inputs = self.processor(**{image.argument: [picture]}, return_tensors="pt").to(self.model.device)
        (item,) = self.model.model.encode_items(image.name, **inputs)
        return item

    def _prompt(self, request: Request, items: Sequence[EncodedItem]) -> Any:
        """The inputs of `generate`."""
        if not isinstance(request, Conversation):
            assert isinstance(request, Completion)
            inputs = self.processor.tokenizer(request.prompt[0], return_tensors="pt")
            self._refuse_placeholders(inputs["input_ids"])
            return inputs.to(self.model.device)
        variables = request.chat_template_kwargs
        if strangers := [name for name in variables if not self._has_variable(name)]:
            raise RequestError(f"The chat template of this model has no {strangers[0]!r}; leave it out.")
        try:
            inputs = self.processor.apply_chat_template(
                [self._chat(request, iter(items))],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                sanitize_control_tokens=True,  # "<image>" in a question is text
                **variables,
            )
        except TemplateError as error:
            raise RequestError(f"The chat template of this model refuses the messages ({error}).") from error
        return inputs.to(self.model.device)

    def _chat(self, request: Conversation, items: Iterator[EncodedItem]) -> list[dict[str, Any]]:
        """The messages as chat templates expect them.

        Where a template has no place for system messages, their text comes before that of the next user.
        """
        chat: list[dict[str, Any]] = []
        waiting: list[str] = []
        for message in request.turns():
            if message.role in ("system", "developer"):
                waiting.append("\n\n".join(part.text or "" for part in message.content))
                if self._takes_system:
                    chat.append({"role": "system", "content": waiting.pop()})
                continue
            content: list[dict[str, Any]] = []
            for part in message.content:
                if part.text is None:
                    content.append({"type": "image", "image": next(items)})
                    continue
                if message.role == "user" and waiting:
                    content.append({"type": "text", "text": "\n\n".join([*waiting, ""])})
                    waiting.clear()
                content.append({"type": "text", "text": part.text})
            chat.append({"role": message.role, "content": content})
        if waiting:
            chat.append({"role": "user", "content": [{"type": "text", "text": "\n\n".join(waiting)}]})
        return chat

    def _has_variable(self, name: str) -> bool:
        """Whether the chat template reads a variable that is the client's to set."""
        ours = {"messages", *inspect.signature(ProcessorMixin.apply_chat_template).parameters}
        ours |= set(self.processor.tokenizer.special_tokens_map)
        return name not in ours and re.search(rf"\b{name}\b", str(self.processor.chat_template)) is not None

    def _shows(self, system: str) -> bool:
        """Whether the chat template writes a system message into the prompt."""
        chat = [{"role": "system", "content": system}, {"role": "user", "content": [{"type": "text", "text": "?"}]}]
        try:
            return system in self.processor.apply_chat_template([chat], tokenize=False)[0]
        except (TemplateError, TypeError):
            return False

    def _refuse_placeholders(self, ids: torch.Tensor) -> None:
        """In a prompt without a chat a placeholder would stand for an item that nobody gave."""
        for bundle in self.processor.bundles:
            if (ids == self.processor.plan.modalities[bundle.name]["token_id"]).any():
                raise RequestError(
                    f"The prompt holds the placeholder {bundle.token}, which stands for an item; send items by "
                    "/v1/chat/completions."
                )

    def _too_long(self, length: int) -> RequestError:
        return RequestError(
            f"The prompt and its pictures are {length:,} tokens, which leaves no room for an answer in the {self.limit:,} "
            "that the model takes; send fewer pictures or a shorter text."
        )


def _data(where: str, part: Part) -> bytes:
    try:
        return part.data()
    except RequestError as error:
        raise RequestError(f"The picture in {where} cannot be used: {error}") from error


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]

"""The thread that runs the model: one request after the other, until each is answered or its client is gone.

    items -> encoded items -> prompt -> `generate` -> writing.py

Items are opened one after the other, so that only one open item is in memory. Requests that are too large are refused as
early as possible: by the size of items before one is opened, by the number of their tokens before they are encoded, and by
the length of text before it is tokenized.
"""

import asyncio
import copy
import inspect
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, LogitsProcessorList
from transformers.processing_utils import ProcessorMixin

from omni.fusion.chats import OldTransformers, readable
from omni.items import Item
from omni.knowing.confidence import Certainty
from omni.loading.encoder import Encoder
from omni.modality import ItemError, Modality
from omni.questions import make_prompts
from omni.registry import make_probes

from .content import Part
from .fields import RequestError
from .requests import Completion, Conversation, Embeddings, Request
from .writing import End, Job, LeftError, Scores, StoppedError, Vectors, Writing

MAX_WAITING = 64
"""The largest number of requests that wait."""
USUAL_LENGTH = 1024
"""The largest number of tokens of an answer, if neither request nor checkpoint sets a limit."""
BYTES = 16
"""The largest number of bytes of text for each token that the model takes. Words are shorter."""
MAX_UNITS = 200_000_000
"""The largest number of units (pixels, samples, ...) in all items of a modality, see `Modality.measure`."""
MAX_TEXT = 1_000_000
"""The largest number of bytes of text in a request. Tokenizing takes two hundred bytes of memory for each."""
LONGEST = 65_536
"""The largest number of tokens of prompt and answer together, if the model's configuration sets no limit."""
COLDEST = 1e-3
"""A lower temperature counts as 0."""
PROBE = "A system message?"
FAILED = "The server failed at this request; its log says why."


class FailedError(RequestError):
    """The server failed to answer a request."""

    status = 500


class BusyError(RequestError):
    """Too many requests are waiting."""

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

    def take(self, request: Request | Embeddings) -> Job:
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
        """Cancel all requests."""
        for job in list(self._line):
            job.wanted = False
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _do(self, job: Job) -> None:
        try:
            if isinstance(job.request, Embeddings):
                self._embed(job)
            else:
                self.answer(job)
        except LeftError:
            pass
        except RequestError as error:
            job.tell(error)
        except Exception:
            logging.getLogger("uvicorn.error").exception("A request failed.")
            job.tell(FailedError(FAILED))

    @torch.inference_mode()
    def try_out(self) -> None:
        """Answer a question about an item of each modality that chats may have. Raises any error of the model."""
        items = [
            Item(
                bundle.name, make_probes(bundle, self.model.config.modalities[bundle.name]["encoder"], preprocessor)[0]
            )
            for bundle in readable(self.processor.bundles)
            if bundle.probes is not None and (preprocessor := self.processor.preprocessors[bundle.name])
        ]
        self.model.generate(**make_prompts(self.processor, [("?", items)]), max_new_tokens=1)

    @torch.inference_mode()
    def answer(self, job: Job) -> None:
        """Answer a chat or a completion in this thread. The answer goes to the job.

        Raises:
            RequestError: the request cannot be answered.
            LeftError: the client is gone.
        """
        job.check_wanted()
        request = job.request
        self._check_length(request)
        items = self._items(job)
        inputs = self._prompt(request, items)
        read = inputs["input_ids"].shape[1]
        if not read:
            raise RequestError("The prompt is empty; write something.")
        self._check_room(read)
        writing, certainty = Writing(job, self.processor.tokenizer, self._ends), Certainty()
        config, known = self._config(request, self.limit - read), self.model.familiarity
        with torch.random.fork_rng(enabled=request.seed is not None), suppress(StoppedError):
            if request.seed is not None:
                torch.manual_seed(request.seed)
            self.model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([certainty, Scores(request, writing, read, self.model)]),
                streamer=writing,
            )
        if known is None:
            writing.finish(read)
            return
        last = request.turns()[-1].content if isinstance(request, Conversation) else []
        asked = " ".join(part.text for part in last if part.text is not None)
        # the calibration holds only for greedy answers without bias and penalties
        greedy = not (config.do_sample or request.logit_bias or request.frequency_penalty or request.presence_penalty)
        likely = certainty.of(torch.tensor([writing.ids]), [*self._ends])[0] if greedy else []
        writing.finish(
            read,
            known.confidence(likely) if likely else None,
            known.judge(items, self.processor.tokenizer, asked),
        )

    @torch.inference_mode()
    def _embed(self, job: Job) -> None:
        """Compute the CLS token of each item, as in `omni embed`."""
        job.check_wanted()
        parts = list(job.request.items())
        if texts := [where for where, part in parts if part.text is not None]:
            takes = " and ".join(f"{bundle.noun}s" for bundle in self.processor.bundles) or "nothing"
            raise RequestError(
                f"This model makes vectors of {takes}, found text in {texts[0]}; send items as parts, such as "
                "{'type': 'image_url', 'image_url': {'url': 'data:...'}}."
            )
        bundles, vectors, read = self._bundles(parts), [], 0
        for (where, part), bundle in zip(parts, bundles, strict=True):
            job.check_wanted()
            inputs = self._prepare(where, part, bundle)
            tower = getattr(self.model.model, f"{bundle.name}_tower")
            encoder = Encoder(tower, self.processor.preprocessors[bundle.name], modality=bundle.name)
            found = encoder.encode({key: inputs[key] for key in bundle.arguments})
            if "cls" not in found:
                raise RequestError(f"The encoder of {bundle.noun}s has no vector for a whole one; leave {where} out.")
            read += self._count(bundle, inputs)
            vectors.append(found["cls"][0, 0].float().cpu().numpy())
        job.tell(Vectors(vectors))
        job.tell(End(True, read, 0))

    def _config(self, request: Request, room: int) -> GenerationConfig:
        """The settings of generation: the checkpoint's, changed by the request's, and limited to the model's length."""
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
        """Refuse text far longer than the model takes, before it is tokenized."""
        texts = [request.prompt[0]] if isinstance(request, Completion) else []
        if isinstance(request, Conversation):
            texts = [part.text or "" for message in request.turns() for part in message.content]
        length, most = sum(len(text.encode()) for text in texts), min(BYTES * self.limit, MAX_TEXT)
        if length > most:
            raise RequestError(
                f"The text has {length:,} bytes, expected at most {most:,} for the {self.limit:,} tokens that the model "
                "takes; send a shorter text."
            )

    def _items(self, job: Job) -> list[Item]:
        """The encoded items of a request."""
        parts = list(job.request.items())
        bundles = self._bundles(parts)
        tokens = [self.processor.least_tokens(bundle.name) for bundle in bundles]
        self._check_room(sum(tokens))
        items = []
        for number, ((where, part), bundle) in enumerate(zip(parts, bundles, strict=True)):
            job.check_wanted()
            inputs = self._prepare(where, part, bundle)
            tokens[number] = self._count(bundle, inputs)
            self._check_room(sum(tokens))
            items += [Item(bundle.name, each) for each in self.model.model.encode_items(bundle.name, **inputs)]
        return items

    def _bundles(self, parts: Sequence[tuple[str, Part]]) -> list[Modality]:
        """The modality of each part. Items that are too large together are refused."""
        bundles = [self._modality(where, part) for where, part in parts]
        sizes: dict[str, int] = defaultdict(int)
        for (where, part), bundle in zip(parts, bundles, strict=True):
            if bundle.measure is None:
                continue
            sizes[bundle.name] += bundle.measure(_data(where, part))
            if sizes[bundle.name] > MAX_UNITS:
                raise RequestError(
                    f"The {bundle.noun}s have {sizes[bundle.name]:,} {bundle.unit} together, expected at most "
                    f"{MAX_UNITS:,}; send fewer of them, or smaller ones."
                )
        return bundles

    def _count(self, bundle: Modality, inputs: Any) -> int:
        """The number of the Thinker's tokens that the prepared items become."""
        config = self.model.config
        shapes = bundle.grid_shapes(config.modalities[bundle.name]["encoder"], inputs)
        return sum(config.num_tokens(bundle.name, tuple(shape)) for shape in shapes)

    def _modality(self, where: str, part: Part) -> Modality:
        """The modality of a part. It must be one of the model's."""
        if found := part.modality(self.processor.preprocessors):
            return found
        if found := part.modality():
            raise RequestError(f"This model takes no {found.noun}s, found one in {where}; leave it out.")
        takes = " and ".join(f"{bundle.noun}s" for bundle in self.processor.bundles) or "text alone"
        said = f"says that it is {part.media_types[0]!r}" if part.media_types else "does not say what it is"
        raise RequestError(
            f"This model takes {takes}, and the file in {where} {said}; send a data URI with a media type of those."
        )

    def _prepare(self, where: str, part: Part, bundle: Modality) -> Any:
        """The inputs that the encoder reads, from an item."""
        assert bundle.open is not None
        try:
            item = bundle.open(_data(where, part))
            return self.processor(**{bundle.argument: [item]}, return_tensors="pt").to(self.model.device)
        except ItemError as error:
            raise RequestError(f"The {bundle.noun} in {where} cannot be used: {error}") from error

    def _prompt(self, request: Request, items: Sequence[Item]) -> Any:
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
        except OldTransformers as error:
            raise RequestError(str(error)) from error
        return inputs.to(self.model.device)

    def _chat(self, request: Conversation, items: Iterator[Item]) -> list[dict[str, Any]]:
        """The messages in the form that chat templates expect.

        If the template does not write system messages, their text is put before that of the next user message.
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
                    name, item = next(items)
                    content.append({"type": name, name: item})
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
        """Whether the chat template reads this variable, and a client may set it."""
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
        """Refuse placeholders in a prompt without a chat, because such a request has no items."""
        for bundle in self.processor.bundles:
            if (ids == self.processor.plan.modalities[bundle.name]["token_id"]).any():
                raise RequestError(
                    f"The prompt holds the placeholder {bundle.token}, which stands for an item; send items by "
                    "/v1/chat/completions."
                )

    def _check_room(self, length: int) -> None:
        """Refuse a prompt with this many tokens if it leaves no room for an answer."""
        if length >= self.limit:
            raise RequestError(
                f"The prompt and its items are {length:,} tokens, which leaves no room for an answer in the {self.limit:,} "
                "that the model takes; send fewer items, smaller ones, or a shorter text."
            )


def _data(where: str, part: Part) -> bytes:
    try:
        return part.data()
    except RequestError as error:
        raise RequestError(f"The {part.noun} in {where} cannot be used: {error}") from error


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]

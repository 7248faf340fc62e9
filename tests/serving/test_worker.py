"""One request after another through real models: what is written, what is refused before it costs anything, who is left."""

import asyncio
import base64
import dataclasses
import io
import logging
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from omni.loading.checkpoint import load
from omni.serving.fields import RequestError
from omni.serving.requests import Chat, Completion, Request, Response
from omni.serving.worker import MAX_WAITING, BusyError, FailedError, Worker
from omni.serving.writing import End, Piece, Token
from omni.vision.pictures import read_picture

SCENE = Path("examples/scene.png")
QUESTION = "describe the picture"
END = "1"
"""The token that ends an answer."""


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def png(width: int, height: int, mode: str = "1") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), "white").save(buffer, "PNG")
    return buffer.getvalue()


def picture(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri(data)}}


def chat(*parts: Any, **fields: Any) -> Chat:
    return Chat.model_validate({"messages": [{"role": "user", "content": list(parts)}], **fields})


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def about_scene(words: str = QUESTION, **fields: Any) -> Chat:
    return chat(picture(SCENE.read_bytes()), text(words), **fields)


@dataclass
class Said:
    pieces: list[str]
    tokens: list[Token]
    end: End

    @property
    def text(self) -> str:
        return "".join(self.pieces)


async def listen(worker: Worker, request: Request) -> Said:
    said = Said([], [], End(False, 0, 0))
    async for event in worker.take(request).answer():
        if isinstance(event, Piece):
            said.pieces.append(event.text)
            said.tokens += event.tokens
        else:
            said.end = event
    return said


def ask(worker: Worker, request: Request) -> Said:
    return asyncio.run(listen(worker, request))


@pytest.fixture(scope="module")
def pair() -> Any:
    return load("checkpoints/omni_tiny")


@pytest.fixture(scope="module")
def worker(pair: Any) -> Iterator[Worker]:
    worker = Worker(*pair)
    yield worker
    worker.close()


@pytest.fixture
def made(make_pair: Callable[..., Any]) -> Iterator[Callable[..., Worker]]:
    """`made(template)`: a worker with a tiny random model, whose chat template may be another."""
    workers: list[Worker] = []

    def make(template: str | None = None, **kwargs: Any) -> Worker:
        model, processor = make_pair(**kwargs)
        if template is not None:
            processor.chat_template = processor.tokenizer.chat_template = template
        workers.append(Worker(model, processor))
        return workers[-1]

    yield make
    for each in workers:
        each.close()


# --- What is written --------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_generate_writes(pair: Any, worker: Worker) -> None:
    model, processor = pair
    content = [{"type": "image", "image": read_picture(SCENE)}, text(QUESTION)]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    written = model.generate(**inputs, max_new_tokens=50)[0, length:]
    said = ask(worker, about_scene(max_tokens=50, logprobs=True, top_logprobs=3))
    assert said.text == processor.decode(written, skip_special_tokens=True)
    assert (said.end.complete, said.end.tokens_read, said.end.tokens_written) == (True, length, len(written))
    assert len(said.pieces) > 5
    # and the probabilities are those of a pass over all of it
    inputs["input_ids"] = torch.cat([inputs["input_ids"], written[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logits = model(**inputs).logits[0, length - 1 : -1]
        logits[:, 4] = -torch.inf  # a placeholder is never written
        expected = logits.log_softmax(-1)
    assert [token.text for token in said.tokens] == [processor.decode([each]) for each in written[:-1]]
    for token, row, written_id in zip(said.tokens, expected, written, strict=False):
        assert token.logprob == pytest.approx(float(row[written_id]), abs=1e-3)
        values, ids = row.topk(3)
        assert [name for name, _ in token.likely] == [processor.decode([each]) for each in ids]
        assert [value for _, value in token.likely] == pytest.approx(values.tolist(), abs=1e-3)


def test_probabilities_are_those_of_the_model_whatever_else_is_asked(worker: Worker) -> None:
    plain = ask(worker, about_scene(max_tokens=1, logprobs=True, top_logprobs=2)).tokens[0]
    fields = {"temperature": 2, "seed": 1, "presence_penalty": 1, "logit_bias": {END: -100}, "top_p": 0.01}
    other = ask(worker, about_scene(max_tokens=1, logprobs=True, top_logprobs=2, **fields)).tokens[0]
    assert other.likely == plain.likely


def test_letters_of_several_tokens_come_whole(made: Callable[..., Worker]) -> None:
    """A random model writes bytes that are no letters, too."""
    worker = made()
    ids = worker.processor.tokenizer("what shape", return_tensors="pt")
    for banned in range(10, 16):
        bias = {str(banned): -100}
        said = ask(worker, Completion(prompt=["what shape"], max_tokens=40, logit_bias=bias))
        written = worker.model.generate(**ids, max_new_tokens=40, suppress_tokens=[banned])[
            0, ids["input_ids"].shape[1] :
        ]
        assert said.text == worker.processor.decode(written, skip_special_tokens=True)


def test_an_answer_ends_before_the_text_to_stop_at(worker: Worker) -> None:
    """Wherever that begins within a token, and nothing of it is told."""
    whole = ask(worker, about_scene()).text
    for start in range(0, len(whole), 11):
        for stop in (whole[start : start + 1], whole[start : start + 9]):
            said = ask(worker, about_scene(stop=[stop, "not there"], logprobs=True))
            assert said.text == whole[: whole.index(stop)]
            assert said.end.complete
            assert "".join(token.text for token in said.tokens).startswith(said.text)
    near = whole[:9] + "?"  # begins like the answer, and is not there
    assert ask(worker, about_scene(stop=[near])).text == whole


def test_how_an_answer_ended_is_told(worker: Worker) -> None:
    whole = ask(worker, about_scene())
    exact = ask(worker, about_scene(max_tokens=whole.end.tokens_written))
    assert (exact.text, exact.end) == (whole.text, whole.end)
    assert whole.end.complete
    cut = ask(worker, about_scene(max_tokens=whole.end.tokens_written - 1))
    assert (cut.text, cut.end.complete) == (whole.text, False)  # the end itself is missing
    short = ask(worker, about_scene(max_tokens=3)).end
    assert (short.complete, short.tokens_read, short.tokens_written) == (False, whole.end.tokens_read, 3)


def test_a_temperature_draws_and_a_seed_draws_the_same(worker: Worker) -> None:
    greedy = ask(worker, about_scene(max_tokens=20)).text
    assert ask(worker, about_scene(max_tokens=20, temperature=0, seed=3)).text == greedy
    assert ask(worker, about_scene(max_tokens=20, top_p=1)).text == greedy
    state = torch.get_rng_state()
    drawn = [
        ask(worker, about_scene(max_tokens=20, temperature=2, seed=seed)).text for seed in (1, 2, 3, 4, 1, 2, 3, 4)
    ]
    assert drawn[:4] == drawn[4:]
    assert len({greedy, *drawn}) >= 3
    assert torch.equal(state, torch.get_rng_state())  # who draws next does not notice
    assert ask(worker, about_scene(max_tokens=20, temperature=2, top_p=0.0001)).text == greedy


def test_settings_of_transformers_are_followed_and_fields_come_first(worker: Worker) -> None:
    given = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 5, "top_k": 1}
    said = ask(worker, about_scene(generation_config=given))
    assert said.end.tokens_written == 5
    assert said.text == ask(worker, about_scene(max_tokens=5)).text
    assert ask(worker, about_scene(generation_config=given, max_tokens=2)).end.tokens_written == 2


def test_bias_and_penalties_are_added_to_the_logits(made: Callable[..., Worker]) -> None:
    worker = made()
    ids = worker.processor.tokenizer("what shape is it", return_tensors="pt")["input_ids"]
    prompt, bias = ids.shape[1], {"7": 2.5, END: -100.0, "12": 1.0}
    with torch.inference_mode():
        for _ in range(30):
            logits = worker.model(input_ids=ids).logits[0, -1]
            logits[worker.processor.image_token_id] = -torch.inf
            for token, value in bias.items():
                logits[int(token)] += value
            counts = torch.bincount(ids[0, prompt:], minlength=len(logits))
            logits -= 0.7 * counts + 0.4 * (counts > 0)
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    fields = {"logit_bias": bias, "frequency_penalty": 0.7, "presence_penalty": 0.4, "max_tokens": 30}
    said = ask(worker, Completion.model_validate({"prompt": ["what shape is it"], **fields}))
    assert said.text == worker.processor.decode(ids[0, prompt:], skip_special_tokens=True)


def test_a_placeholder_is_never_written(worker: Worker) -> None:
    said = ask(worker, about_scene(logit_bias={"4": 100}, max_tokens=3, logprobs=True, top_logprobs=20))
    assert "<image>" not in said.text
    assert all("<image>" not in [name for name, _ in token.likely] for token in said.tokens)


# --- What is asked ----------------------------------------------------------------------------------------------------

TURNS = (
    "{% for message in messages %}<|user|>{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for block in message['content'] %}"
    "{{ block['text'] if block['type'] == 'text' else '<' + block['type'] + '>' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if shout %}A{{ shout }}!{% endif %}{% endif %}"
)


def told(role: str, words: str = "a red circle") -> Chat:
    return Chat.model_validate(
        {"messages": [{"role": role, "content": words}, *chat(text("how many")).model_dump()["messages"]]}
    )


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_stands_where_the_chat_template_has_it(made: Callable[..., Worker], role: str) -> None:
    worker = made(TURNS)
    expected = worker.processor.tokenizer("<|user|>system: a red circle<|user|>user: how many<|assistant|>")
    assert ask(worker, told(role)).end.tokens_read == len(expected["input_ids"])


def test_elsewhere_it_comes_before_the_words_of_the_next_question(worker: Worker) -> None:
    joined = ask(worker, about_scene(f"You are kind.\n\n{QUESTION}", logprobs=True))
    messages = [{"role": "system", "content": "You are kind."}, *about_scene().model_dump()["messages"]]
    said = ask(worker, Chat.model_validate({"messages": messages, "logprobs": True}))
    assert said.text == joined.text
    unsure = {"familiar": None, "confidence": None}  # the question of a chat is its last turn alone
    assert dataclasses.replace(said.end, **unsure) == dataclasses.replace(joined.end, **unsure)
    assert [token.logprob for token in said.tokens] == pytest.approx([token.logprob for token in joined.tokens])
    body = {"input": about_scene().model_dump()["messages"], "instructions": "You are kind."}
    assert ask(worker, Response.model_validate(body)).text == joined.text
    alone = Chat.model_validate({"messages": messages[:1], "max_tokens": 1})
    assert ask(worker, alone).end.tokens_read == ask(worker, chat(text("You are kind."), max_tokens=1)).end.tokens_read


def test_variables_of_the_chat_template_are_the_clients_and_nothing_else(made: Callable[..., Worker]) -> None:
    worker = made(TURNS)
    plain = ask(worker, chat(text("how many"), max_tokens=1)).end.tokens_read
    loud = ask(worker, chat(text("how many"), max_tokens=1, chat_template_kwargs={"shout": "ha"})).end.tokens_read
    assert loud > plain
    for name in (
        "whisper",
        "messages",
        "chat_template",
        "tokenize",
        "sanitize_control_tokens",
        "add_generation_prompt",
    ):
        with pytest.raises(RequestError, match=f"has no '{name}'"):
            ask(worker, chat(text("how many"), chat_template_kwargs={name: False}))


@pytest.mark.new_chats
def test_control_tokens_in_a_text_are_text(worker: Worker) -> None:
    said = ask(worker, chat(text("<image><|end|>"), max_tokens=1))
    assert said.end.tokens_read > ask(worker, chat(text(""), max_tokens=1)).end.tokens_read + 2


def test_a_chat_that_the_template_refuses_is_a_sentence(made: Callable[..., Worker]) -> None:
    worker = made("{{ raise_exception('no chats today') }}")
    with pytest.raises(RequestError, match="refuses the messages .no chats today"):
        ask(worker, chat(text("how many")))


# --- What is refused, and when ----------------------------------------------------------------------------------------


def test_tokens_of_pictures_are_counted_before_one_is_opened(worker: Worker) -> None:
    with pytest.raises(RequestError, match="are 2,050 tokens, which leaves no room for an answer in the 2,048"):
        ask(worker, chat(*[picture(b"no picture")] * 41))
    with pytest.raises(RequestError, match="messages.0..content.0. cannot be used: .* not a picture"):
        ask(worker, chat(*[picture(b"no picture")] * 40))


def test_pixels_of_pictures_are_counted_before_one_is_opened(worker: Worker) -> None:
    whole = png(7070, 7070)
    with pytest.raises(RequestError, match="have 249,924,500 pixels together, expected at most 200,000,000"):
        ask(worker, chat(*[picture(whole)] * 5))
    with pytest.raises(RequestError, match="messages.0..content.0. cannot be used: .* too early"):
        ask(worker, chat(*[picture(whole[:100])] * 5))


def test_of_large_pictures_one_is_in_memory(worker: Worker) -> None:
    large = picture(png(3000, 2500, "RGB"))  # 30 MB for Pillow

    def peak(count: int) -> int:
        ask(worker, chat(*[large] * count, max_tokens=1))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    few = peak(2)  # memory that is free again is kept for the next
    assert peak(8) < few + 25_000  # KiB


@pytest.mark.parametrize("kind", ["chat", "system", "completion", "instructions"])
def test_text_is_measured_before_it_becomes_tokens(worker: Worker, kind: str) -> None:
    words = "\u00e9" * (8 * 2048) + "a"
    request = {
        "chat": chat(text(words)),
        "system": told("system", words),
        "completion": Completion(prompt=[words]),
        "instructions": Response.model_validate({"input": "a", "instructions": words}),
    }[kind]
    with pytest.raises(
        RequestError, match="The text has 32,7[67][0-9] bytes, expected at most 32,768 for the 2,048 tokens"
    ):
        ask(worker, request)


def test_a_prompt_must_leave_room_for_an_answer(worker: Worker) -> None:
    with pytest.raises(RequestError, match="are 2,048 tokens, which leaves no room"):
        ask(worker, Completion(prompt=["ab" * 1024]))
    said = ask(worker, Completion(prompt=["ab" * 1023], max_tokens=100))
    assert said.end.tokens_read + said.end.tokens_written <= 2048


def test_prompts_without_a_chat(worker: Worker) -> None:
    with pytest.raises(RequestError, match="The prompt is empty"):
        ask(worker, Completion(prompt=[""]))
    with pytest.raises(RequestError, match="holds the placeholder <image>"):
        ask(worker, Completion(prompt=["<image> hello"]))


def test_ids_that_are_no_tokens_are_refused(worker: Worker) -> None:
    with pytest.raises(RequestError, match="In 'logit_bias': expected ids of tokens below 966, found '966'"):
        ask(worker, about_scene(logit_bias={"965": 1, "966": 1}))


# --- The line ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(pair: Any) -> Iterator[list[int]]:
    """One entry for each step of the model."""
    counted: list[int] = []
    hook = pair[0].lm_head.register_forward_hook(lambda *_: counted.append(1))
    yield counted
    hook.remove()


def test_nothing_is_written_for_a_client_that_leaves(worker: Worker, steps: list[int]) -> None:
    """Neither when an answer has begun nor before; the next client does not wait for them."""
    endless = chat(text("hello"), logit_bias={END: -100}, max_tokens=2000)

    async def leave() -> None:
        begun, *waiting = (worker.take(endless) for _ in range(20))
        answer = begun.answer()
        await anext(answer)
        await answer.aclose()
        for each in waiting:
            each.wanted = False
        assert (await listen(worker, chat(text("hello"), logit_bias={END: -100}, max_tokens=2))).end.tokens_written == 2

    asyncio.run(leave())
    assert len(steps) < 500


def test_a_client_that_is_cancelled_is_one_that_left(worker: Worker, steps: list[int]) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(listen(worker, chat(text("hello"), logit_bias={END: -100}, max_tokens=2000)))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await listen(worker, chat(text("hello"), max_tokens=2))

    asyncio.run(cancel())
    assert len(steps) < 1500


def test_the_line_has_an_end_and_who_left_does_not_stand_in_it(worker: Worker) -> None:
    async def fill() -> None:
        line = [worker.take(chat(text("hello"), max_tokens=1)) for _ in range(MAX_WAITING)]
        with pytest.raises(BusyError, match="64 requests are waiting already"):
            for _ in range(MAX_WAITING):  # some were answered meanwhile
                line.append(worker.take(chat(text("hello"), max_tokens=1)))
        for each in line:
            each.wanted = False
        assert (await listen(worker, chat(text("hello"), max_tokens=1))).end.tokens_written == 1

    asyncio.run(fill())


def test_what_fails_is_logged_and_told_without_its_inside(
    made: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = made()
    with torch.no_grad():
        worker.model.lm_head.weight.fill_(torch.nan)
    drawn = chat(text("how many"), temperature=1)
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(FailedError, match="^The server failed at this request; its log"),
    ):
        ask(worker, drawn)
    assert "probability tensor contains" in caplog.text
    assert ask(worker, chat(text("how many"), max_tokens=1)).end.tokens_written == 1  # and the next is answered


def test_a_model_without_weights_is_found_out(make_pair: Callable[..., Any]) -> None:
    model, processor = make_pair()
    worker = Worker(model, processor)
    worker.try_out()
    model.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        worker.try_out()
    worker.close()

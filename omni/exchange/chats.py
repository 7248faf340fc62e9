"""Make the tokenizer of a language model take items: a placeholder for each modality, and a chat template that writes it."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import AddedToken

from omni.checkpoints.folder import CheckpointError
from omni.data.conversations import ask
from omni.fusion.parts import grow_vocabulary
from omni.modality import Modality

AS_TEXT = (
    "{%- set placeholders = PLACEHOLDERS -%}"
    "{%- set turned = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or message['content'] is not iterable -%}"
    "{%- set turned.messages = turned.messages + [message] -%}"
    "{%- else -%}"
    "{%- set turned.text = '' -%}"
    "{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'text' -%}{%- set turned.text = turned.text + block['text'] -%}"
    "{%- elif block['type'] in placeholders -%}{%- set turned.text = turned.text + placeholders[block['type']] -%}"
    "{%- else -%}"
    "{{- raise_exception('Blocks are text and ' ~ (placeholders | join(' and ')) ~ ', found ' ~ block['type']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set turned.messages = turned.messages + [dict(message, content=turned.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = turned.messages %}"
)
"""Lines in front of a chat template that reads text alone. They turn blocks of text and items into text."""

PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- else -%}{{- message['role'] | capitalize + ': ' + message['content'] + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
"""The chat template for a language model without one."""


def add_placeholder(modality: Modality, tokenizer: Any, model: Any, notes: list[str]) -> int:
    """The id of a modality's placeholder. A tokenizer without one gets it; all other ids stay."""
    token = modality.token
    before = tokenizer.get_vocab()
    if tokenizer.encode(token, add_special_tokens=False) == [before.get(token)]:
        notes.append(f"the tokenizer has {token} already, id {before[token]}")
        return int(before[token])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(token)
    after = tokenizer.get_vocab()
    assert after == {**before, token: token_id}
    assert token_id not in before.values()
    rows = len(model.get_input_embeddings().weight)
    if token_id < rows:
        notes.append(f"the tokenizer gets {token} as id {token_id}, which was free among {rows:,} embeddings")
    else:
        grow_vocabulary(model, token_id + 1)
        notes.append(f"the tokenizer gets {token} as id {token_id}; the {rows:,} embeddings grow to {token_id + 1:,}")
    return int(token_id)


def prepare_chats(bundles: Sequence[Modality], tokenizer: Any, notes: list[str]) -> None:
    """Make sure that the chat template takes items, and that the tokenizer can pad."""
    tokens = " and ".join(bundle.token for bundle in bundles)
    as_text = AS_TEXT.replace("PLACEHOLDERS", json.dumps({bundle.name: bundle.token for bundle in bundles}))
    if tokenizer.chat_template is None:
        begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = as_text + ("{{- bos_token -}}" if begins else "") + PLAIN
        notes.append(
            "the tokenizer had no chat template; it writes questions as `User: ...` and answers as `Assistant: ...`"
        )
    elif _holds_items(bundles, tokenizer):
        notes.append("the chat template is kept")
    else:
        tokenizer.chat_template = as_text + tokenizer.get_chat_template()
        if not _holds_items(bundles, tokenizer):
            raise CheckpointError(
                f"Expected a chat template that writes {tokens} and then the question, once each; the tokenizer's does not, "
                "so correct it."
            )
        notes.append(f"the chat template takes text alone, so lines in front of it turn items into {tokens}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer had no padding token; it pads with {tokenizer.eos_token}")


def _holds_items(bundles: Sequence[Modality], tokenizer: Any) -> bool:
    """Whether the chat template writes a placeholder for an item of each modality, and then the question."""
    question, tokens = "What is it?", [bundle.token for bundle in bundles]
    try:
        asked = ask(question, items=[bundle.name for bundle in bundles])
        written = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a program, and may raise anything on contents that it was not written for
        return False
    parts = [*tokens, question]
    places = [written.find(part) for part in parts]
    return all(written.count(part) == 1 for part in parts) and places == sorted(places)

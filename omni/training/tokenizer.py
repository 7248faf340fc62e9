"""The tokenizer of a new small Thinker: byte-level BPE, so that it represents any text, with a chat template."""

import json
from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for block in message['content'] -%}{{- block['text'] -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endgeneration -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<|user|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'text' -%}{{- block['text'] -}}"
    "{%- elif block['type'] in PLACEHOLDERS -%}{{- PLACEHOLDERS[block['type']] -}}"
    "{%- else -%}{{- raise_exception('A block is text or one of PLACEHOLDERS, found ' + block['type']) -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- else -%}"
    "{{- raise_exception('Roles are user and assistant, found ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""Turns of user and assistant. An answer and its end-of-text token are inside `generation`, which marks labels for the loss.
`PLACEHOLDERS` is replaced by a JSON object with the placeholder of each type of block.
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int, placeholders: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Learn byte-level BPE merges from `texts`.

    Args:
        texts: what the Thinker will read and write.
        vocab_size: the largest number of tokens, including 256 bytes and the special tokens.
        placeholders: the placeholder of each modality, `{"image": "<image>"}`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, USER, ASSISTANT, *placeholders.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, *placeholders.values()],
        chat_template=CHAT_TEMPLATE.replace("PLACEHOLDERS", json.dumps(dict(placeholders))),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )

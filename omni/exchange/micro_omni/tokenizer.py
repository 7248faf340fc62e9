"""micro-Omni's tokenizer, SentencePiece BPE, as a fast tokenizer of transformers. Every piece keeps its id.

The merges follow from the pieces: SentencePiece joins the two neighbours that form the piece with the lowest id.
Placeholders can be added, and get the ids after the last piece.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from omni.exchange.micro_omni.files import ConversionError
from omni.files import expect_ordinary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""The kinds of pieces in SentencePiece's format."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['content'] is not string -%}"
    "{%- for block in message['content'] -%}"
    "{%- if block['type'] != 'text' -%}{{- '<' + block['type'] + '>' -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set text = message['content'] -%}"
    "{%- else -%}{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text')"
    " | join(' ') -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- ' ' + text + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- ('' if loop.first else ' ') + text -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""micro-Omni's order: the items, `<s>`, the words, a space, the answer. micro-Omni does not train the end of an answer.
Training with omni does, with `</s>`."""


def convert_tokenizer(path: Path, placeholders: Sequence[str] = (), length: int = 512) -> PreTrainedTokenizerFast:
    """Convert a SentencePiece model.

    Args:
        path: tokenizer.model.
        placeholders: tokens to add after the last piece. The tokenizer then gets the chat template, which writes `<s>`
            after the items. Without placeholders the tokenizer itself puts `<s>` in front of every text.
        length: number of tokens that the model takes at most.

    Raises:
        ConversionError: the file is no SentencePiece BPE of micro-Omni's kind, or the packages that read it are missing.
    """
    model = _read(path)
    pieces = [piece.piece for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    if model.trainer_spec.model_type != 2 or kinds[:3] != [UNKNOWN, CONTROL, CONTROL]:
        raise ConversionError(
            f"{str(path)!r} is another kind of SentencePiece model than micro-Omni's; expected BPE with the unknown token, "
            f"the begin and the end of a text as ids 0, 1 and 2, found {pieces[:3]}."
        )
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(ids, _merges(ids, kinds), unk_token=pieces[0], fuse_unk=True, byte_fallback=BYTE in kinds)
    )
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    fallback = [decoders.ByteFallback()] if BYTE in kinds else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), *fallback, decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    added = [
        (p, k != USER_DEFINED) for p, k in zip(pieces, kinds, strict=True) if k in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens([AddedToken(p, normalized=False, special=special) for p, special in added])
    if not placeholders:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{pieces[1]} $A", pair=f"{pieces[1]} $A $B", special_tokens=[(pieces[1], 1)]
        )
    elif taken := [each for each in placeholders if each in ids]:
        raise ConversionError(
            f"{str(path)!r} has a piece {taken[0]!r}, which omni needs as a placeholder; convert a tokenizer without that "
            "piece."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=pieces[0],
        pad_token=pieces[0],
        bos_token=pieces[1],
        eos_token=pieces[2],
        additional_special_tokens=list(placeholders),
        chat_template=CHAT_TEMPLATE if placeholders else None,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=length,
    )


def _read(path: Path) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConversionError(
            f"Reading {str(path)!r} needs sentencepiece and protobuf: pip install 'omni-thinker[convert]'."
        ) from error
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(expect_ordinary(path).read_bytes())
    except (DecodeError, OSError) as error:
        raise ConversionError(
            f"{str(path)!r} is no SentencePiece model, or it is damaged ({error}); get the file again."
        ) from error
    if not model.pieces:
        raise ConversionError(f"{str(path)!r} is no SentencePiece model: it has no pieces; get the file again.")
    return model


def _merges(ids: dict[str, int], kinds: list[int]) -> list[tuple[str, str]]:
    """The pairs of neighbours that join, in order of the id of the piece that they form."""
    merges = []
    for piece, i in ids.items():
        if kinds[i] == NORMAL:
            pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            merges += [pair for pair in pairs if all(part in ids and kinds[ids[part]] == NORMAL for part in pair)]
    return merges


def _normalizer(settings: Any) -> normalizers.Normalizer:
    """SentencePiece's changes to a text before it is cut into pieces."""
    steps: list[normalizers.Normalizer] = []
    if settings.precompiled_charsmap:
        steps.append(normalizers.Precompiled(settings.precompiled_charsmap))
    if settings.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Strip()]
    if settings.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if settings.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps)

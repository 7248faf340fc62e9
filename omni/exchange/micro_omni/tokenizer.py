"""micro-Omni's tokenizer, SentencePiece BPE, as a fast tokenizer of transformers; no id moves.

A piece keeps its id; merges follow from the pieces, as SentencePiece joins the neighbours that make the piece with the
lowest id. Beside what SentencePiece does, `<image>` can be added: it gets the first id after the last piece.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from omni.exchange.micro_omni.files import ConversionError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Kinds of pieces in SentencePiece's format."""

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
"""micro-Omni's order: what is shown, `<s>`, then the words, and an answer after a space. It never learnt to end an answer;
one that is trained here ends with `</s>`."""


def convert_tokenizer(path: Path, placeholder: str | None = None, length: int = 512) -> PreTrainedTokenizerFast:
    """Read a SentencePiece model.

    Args:
        path: tokenizer.model.
        placeholder: a token to add behind the last piece. The tokenizer then has the chat template and adds nothing by
            itself, since what is shown stands before `<s>`; without it `<s>` is put in front of every text.
        length: the longest sequence that the model takes.

    Raises:
        ConversionError: no SentencePiece BPE of micro-Omni's kind, or SentencePiece's format cannot be read here.
    """
    model = _read(path)
    pieces = [piece.piece for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    if model.trainer_spec.model_type != 2 or kinds[:3] != [UNKNOWN, CONTROL, CONTROL]:
        raise ConversionError(
            f"{str(path)!r} is another kind of SentencePiece model than micro-Omni's: expected BPE with the unknown token, "
            f"begin and end of text as ids 0, 1 and 2, found {pieces[:3]}."
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
    if placeholder is None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{pieces[1]} $A", pair=f"{pieces[1]} $A $B", special_tokens=[(pieces[1], 1)]
        )
    elif placeholder in ids:
        raise ConversionError(f"{str(path)!r} has a piece {placeholder!r}, which is to stand for pictures; it cannot.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=pieces[0],
        pad_token=pieces[0],
        bos_token=pieces[1],
        eos_token=pieces[2],
        additional_special_tokens=[placeholder] if placeholder else [],
        chat_template=CHAT_TEMPLATE if placeholder else None,
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
            f"To read {str(path)!r}, sentencepiece and protobuf are needed: pip install 'omni-thinker[convert]'."
        ) from error
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ConversionError(f"{str(path)!r} is no SentencePiece model, or damaged ({error}).") from error
    if not model.pieces:
        raise ConversionError(f"{str(path)!r} is no SentencePiece model: it has no pieces.")
    return model


def _merges(ids: dict[str, int], kinds: list[int]) -> list[tuple[str, str]]:
    """Which neighbours join, the first ones first: those that make the piece with the lowest id."""
    merges = []
    for piece, i in ids.items():
        if kinds[i] == NORMAL:
            pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            merges += [pair for pair in pairs if all(part in ids and kinds[ids[part]] == NORMAL for part in pair)]
    return merges


def _normalizer(settings: Any) -> normalizers.Normalizer:
    """What SentencePiece does to a text before it looks for pieces."""
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

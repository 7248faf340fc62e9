"""The fast tokenizer splits texts as SentencePiece does, and no id moves."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from omni.exchange.micro_omni import ConversionError
from omni.exchange.micro_omni.tokenizer import convert_tokenizer

TEXTS = [
    "",
    " ",
    "What color is the circle?",
    "  two   spaces,\ttabs\nand lines \n",
    "Über naïve façades — ½ ﬁne \uff21\uff22 ① ㎏",
    "日本語 and 😀😀 emoji",
    "aaaaaaaaa aaaa aa",
    "the<s>red</s> <image> <unk>",
    "\u200bzero\u00a0width\ufeff",
]


@pytest.fixture
def path(tokenizer_model: bytes, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    return tmp_path / "tokenizer.model"


def test_it_splits_as_sentencepiece_does(path: Path, tokenizer_model: bytes) -> None:
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model), convert_tokenizer(path)
    rng = random.Random(0)
    alphabet = "abcdehilnorst  .,?T"
    drawn = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(400)]
    for text in [*TEXTS, *drawn]:
        ids = theirs.encode(text)
        # written-out control tokens are plain text to SentencePiece, as they are to `omni ask`
        assert ours.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, text
        assert ours.decode(ids) == theirs.decode([i for i in ids if i]).lstrip() or 0 in ids, text
    assert [ours.convert_ids_to_tokens(i) for i in range(200)] == [theirs.id_to_piece(i) for i in range(200)]
    assert (ours.pad_token_id, ours.unk_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 0, 1, 2)


def test_bytes_take_the_place_of_unknown_characters(tmp_path: Path, train: Callable[..., Path]) -> None:
    path = train(tmp_path, byte_fallback=True, vocab_size=400)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), convert_tokenizer(path)
    for text in ("日本 and red", "a 😀"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == text


@pytest.fixture
def train() -> Callable[..., Path]:
    def train(folder: Path, **options: Any) -> Path:
        (folder / "text").write_text("the red circle and the blue square stand on the dark background\n" * 3)
        settings = {"model_type": "bpe", "vocab_size": 60, "minloglevel": 2, **options}
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), hard_vocab_limit=False, **settings
        )
        return folder / "tokenizer.model"

    return train


def test_another_kind_of_model_is_refused(tmp_path: Path, train: Callable[..., Path]) -> None:
    with pytest.raises(ConversionError, match="another kind of SentencePiece model"):
        convert_tokenizer(train(tmp_path, model_type="unigram"))
    with pytest.raises(ConversionError, match="another kind of SentencePiece model"):
        convert_tokenizer(train(tmp_path, pad_id=0, unk_id=1, bos_id=2, eos_id=3))
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ConversionError, match="no SentencePiece model"):
        convert_tokenizer(tmp_path / "tokenizer.model")


def test_a_piece_that_is_the_placeholder_is_refused(tmp_path: Path, train: Callable[..., Path]) -> None:
    with pytest.raises(ConversionError, match="has a piece '<image>'"):
        convert_tokenizer(train(tmp_path, user_defined_symbols=["<image>"]), ["<image>"])


def test_without_sentencepiece_the_extra_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConversionError, match=r"pip install 'omni-thinker\[convert\]'"):
        convert_tokenizer(path)


def test_an_answer_stands_after_the_question_and_ends(path: Path) -> None:
    """As micro-Omni's fine-tuning puts them, with the end that it never trains."""
    tokenizer = convert_tokenizer(path, ["<image>"])
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "what is it"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<image><s>what is it a circle</s>"
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert encoded["input_ids"] == [200, 1, *theirs.encode("what is it a circle"), 2]
    spoken = [i for i, says in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if says]
    assert spoken == [*theirs.encode("a circle"), 2]

"""The tokenizer of a new Thinker is made of what its training data say, drawn or brought."""

import json
from itertools import islice
from pathlib import Path

from omni.scenes.recipe import Scenes
from omni.training.answers import texts
from omni.training.fused import build_omni
from omni.training.sections import Files


def test_texts_are_the_questions_and_answers_of_the_rows(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "<image>which bird"},
        {"role": "assistant", "content": "a wren"},
        {"role": "user", "content": "how many"},
        {"role": "assistant", "content": "two"},
    ]
    rows = [{"image": "a.png", "messages": chat}, {"image": "b.png", "caption": "a kite"}]
    (path := tmp_path / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")  # no picture is opened for it
    said = list(texts(Files(path=str(path), prompt="What is it?")))
    assert said == ["which bird", "a wren", "how many", "two", "What is it?", "a kite"]
    drawn = Scenes(count=3)
    assert list(islice(texts(drawn), 10)) == list(islice(drawn.texts(), 10))


def test_a_new_thinker_has_tokens_for_the_words_of_its_data(tmp_path: Path) -> None:
    thinker = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    (path := tmp_path / "thinker.json").write_text(json.dumps(thinker | {"num_attention_heads": 2}))
    section = {
        "thinker": str(path),
        "vocab_size": 300,
        "image": {"encoder": "checkpoints/vision_tiny", "projector": "linear"},
    }
    words = ["zebrafinch zebrafinch"] * 9
    (_, processor), (_, bytes_alone) = build_omni(**section, texts=words), build_omni(**section)
    assert len(processor.tokenizer.tokenize("zebrafinch")) == 1
    assert len(bytes_alone.tokenizer.tokenize("zebrafinch")) == len("zebrafinch")

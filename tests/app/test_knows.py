"""What the page says that a model knows."""

from pathlib import Path

import pytest

from omni.app.knows import UNKNOWN, UNMEASURED, knowledge
from omni.checkpoints.cards import write_card
from omni.registry import get_modality

IMAGE, AUDIO = get_modality("image"), get_modality("audio")
CARD = """---
license: apache-2.0
language: [en, de]
---
<!-- by hand -->
# A model

It hears *spoken* questions; see [the paper](https://example.com). It needs a package.

## Evaluation

| kind | exact match |
| --- | ---: |
| Sight test of old | 1 |

Sight test FAILED: over all 20 questions 0.500 with the real pictures, 0.500 with blank\\_ones.
"""


def test_it_is_what_the_shipped_card_says() -> None:
    assert knowledge("checkpoints/omni_tiny", [IMAGE])[:2] == [
        "It answers questions about pictures.",
        "A small model that answers typed and spoken questions about pictures of coloured shapes, and writes down what a "
        "voice says; 8,439,936 parameters, trained from nothing on generated scenes and synthetic voices.",
    ]


def test_it_is_told_in_plain_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    assert knowledge(tmp_path, [AUDIO, IMAGE]) == [
        "It answers questions about sounds and pictures.",
        "It hears spoken questions; see the paper.",
        "Languages: en, de.",
        "Sight test FAILED: over all 20 questions 0.500 with the real pictures, 0.500 with blank_ones.",
    ]


@pytest.mark.parametrize(
    "card", ["", "no title", "# A title\n\n## Another\n\nA sentence.", "# Adapter\n\n- one\n- two"]
)
def test_what_a_card_does_not_say_is_said_to_be_unknown(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert knowledge(tmp_path, []) == ["It answers questions in text alone.", UNKNOWN, UNMEASURED]


def test_a_model_without_a_card_is_unknown(tmp_path: Path) -> None:
    for folder in ("", tmp_path):
        assert knowledge(folder, [IMAGE])[1:] == [UNKNOWN]
    write_card(tmp_path, None, "omni")
    assert knowledge(tmp_path, [IMAGE])[1:] == [
        "What it was trained on is not described yet; describe it here.",
        UNMEASURED,
    ]


def test_a_damaged_card_does_not_stop_the_page(tmp_path: Path) -> None:
    for content in (b"---\nlanguage: [\n---\n# A\n\nb", b"---\n- a\n---\n", b"\xff"):
        (tmp_path / "README.md").write_bytes(content)
        assert "cannot be read" in knowledge(tmp_path, [IMAGE])[1]

"""A few sentences about a model, from its modalities and from the model card in its folder."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import metadata_load
from yaml import YAMLError

from omni.modality import Modality

UNKNOWN = "What it was trained on is not written in its folder."
UNMEASURED = "Whether it uses its items has not been measured (sight test)."


def knowledge(folder: str | Path, bundles: Sequence[Modality]) -> list[str]:
    """Sentences about the model's modalities, its training, its languages, and its sight test.

    Args:
        folder: the folder of the checkpoint.
        bundles: the model's modalities.
    """
    nouns = " and ".join(f"{bundle.noun}s" for bundle in bundles)
    takes = f"It answers questions about {nouns}." if nouns else "It answers questions in text alone."
    path = Path(folder) / "README.md"
    if not str(folder) or not path.is_file():
        return [takes, UNKNOWN]
    try:
        text, metadata = path.read_text(encoding="utf-8"), metadata_load(path) or {}
    except (OSError, ValueError, YAMLError) as error:
        return [takes, f"Its model card cannot be read ({type(error).__name__}); see README.md in its folder."]
    languages = metadata.get("language") or []
    spoken = ", ".join([languages] if isinstance(languages, str) else map(str, languages))
    tested = re.search(r"^Sight test .*", text, re.MULTILINE)
    return [
        takes,
        _trained(text) or UNKNOWN,
        *([f"Languages: {spoken}."] if spoken else []),
        _plain(tested[0]) if tested else UNMEASURED,
    ]


def _trained(text: str) -> str:
    """The first sentence below the title of a card."""
    below = re.search(r"^# .*\n+(?![#<|\s-])((?:.+\n?)+)", text, re.MULTILINE)
    return re.split(r"(?<=[.!?])\s", _plain(below[1]), maxsplit=1)[0] if below else ""


def _plain(markdown: str) -> str:
    """Markdown as plain text. A character after a backslash is no markup."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(markdown.split()))
    return re.sub(r"\\(.)|[*`]", lambda mark: mark[1] or "", text)

"""Two files that go into a saved folder: the code that transformers imports for it, and the model card for people."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni.files import write_text_whole

REMOTE_CODE = '''"""What transformers runs of this checkpoint with trust_remote_code=True: the import of its package."""

try:
    import omni

    omni.OmniProcessor  # noqa: B018 - the package of this name on PyPI is another project's, and has none
except (ImportError, AttributeError) as error:
    raise ImportError(
        "This checkpoint needs the package omni-thinker, which is imported as `omni` (the `omni` on PyPI is another "
        "project): pip install omni-thinker"
    ) from error


def __getattr__(name):
    return getattr(omni, name)
'''


def remote_code(folder: Any, classes: Mapping[str, str]) -> dict[str, str]:
    """Write the module that transformers imports with `trust_remote_code=True`, and return its `auto_map`.

    Args:
        folder: the folder of a checkpoint.
        classes: for each Auto class, the class of omni that it returns.
    """
    path = Path(folder) / "omni_remote.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(path, REMOTE_CODE)
    return {auto: f"{path.stem}.{name}" for auto, name in classes.items()}


MEASURED = re.compile(r"<!-- omni evaluate -->\n.*?<!-- end of omni evaluate -->\n?", re.DOTALL)
"""What `omni evaluate --card` writes into a model card; see `omni.evaluation.tables`."""


def measured_card(config: Any) -> str | None:
    """The model card of the folder that a model was loaded from; None if the weights have changed since."""
    source = Path(str(config.name_or_path or ""))
    try:
        same = json.loads((source / "config.json").read_text(encoding="utf-8"))["fingerprints"] == config.fingerprints
        return (source / "README.md").read_text(encoding="utf-8") if same and config.fingerprints else None
    except (OSError, ValueError, KeyError):
        return None


def write_card(folder: str | Path, measured: str | None, model_type: str) -> None:
    """Write the model card of a folder that goes to the hub, as README.md.

    Args:
        folder: the folder. transformers has put the hub's README.md or a generated one there.
        measured: a card with scores of these weights. Without it, the hub's card stays but loses its scores, which belong
            to other weights; a generated card is replaced by one that says that nothing has been measured.
        model_type: the model's type.
    """
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if measured is not None:
        text = measured
    elif not text or "has been automatically generated" in text:
        text = NEW_CARD.format(tag=CARD_TAGS.get(model_type, "feature-extraction"), kind=model_type)
    else:
        text = MEASURED.sub("", text)
    write_text_whole(path, text)


CARD_TAGS = {
    "omni": "image-text-to-text",
    "omni_vision": "image-feature-extraction",
    "omni_classifier": "image-classification",
}
NEW_CARD = """---
library_name: transformers
pipeline_tag: {tag}
---
# A model of type {kind}

What it was trained on is not described yet; describe it here. It needs the package `omni-thinker` (`import omni` before
`from_pretrained`, or `trust_remote_code=True`; the `omni` on PyPI is another project).

Its scores have not been measured. Save it into a folder with this file as README.md, and
`omni evaluate FOLDER --card FOLDER/README.md` writes them here.
"""

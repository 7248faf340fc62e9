"""The model card of a taught model."""

from collections.abc import Sequence
from pathlib import Path

from omni.files import write_text_whole
from omni.registry import get_modality
from omni.training.recipe import Files, Recipe

from .lesson import Lesson

TEXT = """---
library_name: transformers
pipeline_tag: image-text-to-text
---
# {base} {verbs}

`omni teach` made this from the language model `{base}` and {encoders}. {learnt} learnt from {samples:,} samples of
{data}, objective "{objective}"; the language model and the encoders {kept}. This folder holds the trained parts, and names
the folders of the others with the fingerprints of their weights. `recipe.json` is the recipe, for `omni train`.

```bash
omni ask FILE "QUESTION" --checkpoint {folder}
```

"""


def write_card(path: Path, lesson: Lesson, recipes: Sequence[Recipe], folder: Path) -> None:
    """Write a card that says what the model is and what it was trained on. `omni.evaluation.update_card` adds scores."""
    recipe, arguments = recipes[-1], recipes[-1].arguments
    rows = arguments["per_device_train_batch_size"] * arguments.get("gradient_accumulation_steps", 1)
    projectors = "The projectors" if len(lesson.encoders) > 1 else "The projector"
    nouns = " and ".join(f"{get_modality(name).noun}s" for name in lesson.encoders)
    text = TEXT.format(
        base=Path(lesson.language_model).stem,
        verbs=f"takes {nouns}",
        encoders=" and ".join(f"the encoder of {name} `{Path(each).name}`" for name, each in lesson.encoders.items()),
        learnt=f"{projectors} and LoRA matrices of the language model" if lesson.lora else f"{projectors} alone",
        samples=rows * sum(each.arguments["max_steps"] for each in recipes),
        data=f"`{recipe.train.path}`" if isinstance(recipe.train, Files) else "generated scenes (`omni.scenes`)",
        objective=recipe.objective,
        kept="are unchanged but for these matrices" if lesson.lora else "are unchanged",
        folder=folder,
    )
    write_text_whole(path, text)

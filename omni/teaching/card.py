"""The model card of a taught model."""

from collections.abc import Sequence
from pathlib import Path

from omni.files import write_text_whole
from omni.registry import get_modality
from omni.training.recipe import Recipe
from omni.training.sections import Files, sources_of

from .lesson import Lesson

TEXT = """---
library_name: transformers
{tag}---
# {base} {verbs}

`omni teach` made this from the language model `{base}` with {encoders}. {learnt} learnt from {samples:,} samples of
{data}, objective "{objective}"; the language model and the encoders {kept}. This folder holds the trained parts, and names
the folders of the others with the fingerprints of their weights. `recipe.json` is the recipe, for `omni train`.

```bash
omni ask FILE "QUESTION" --checkpoint {folder}
```

"""


def write_card(path: Path, lesson: Lesson, recipes: Sequence[Recipe], folder: Path) -> None:
    """Write a card that says what the model is and what it was trained on. `omni.evaluation.update_card` adds scores."""
    recipe, arguments, sources = recipes[-1], recipes[-1].arguments, sources_of(recipes[-1].train)
    rows = arguments["per_device_train_batch_size"] * arguments.get("gradient_accumulation_steps", 1)
    projectors = "The projectors" if len(lesson.encoders) > 1 else "The projector"
    nouns = " and ".join(f"{get_modality(name).noun}s" for name in lesson.encoders)
    tag = next((f"pipeline_tag: {name}-text-to-text\n" for name in ("image", "audio") if name in lesson.encoders), "")
    data = [f"`{part.path}`" if isinstance(part, Files) else "generated scenes (`omni.scenes`)" for part in sources]
    text = TEXT.format(
        tag=tag,
        base=Path(lesson.language_model).stem,
        verbs=f"takes {nouns}",
        encoders=" and ".join(f"the encoder of {name} `{Path(each).name}`" for name, each in lesson.encoders.items()),
        learnt=f"{projectors} and LoRA matrices of the language model" if lesson.lora else f"{projectors} alone",
        samples=rows * sum(each.arguments["max_steps"] for each in recipes),
        data=" and ".join(data),
        objective=recipe.objective,
        kept="are unchanged but for these matrices" if lesson.lora else "are unchanged",
        folder=folder,
    )
    write_text_whole(path, text)

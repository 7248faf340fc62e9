"""`omni train` in one of several processes, which also notes the answers that it learns from, step by step.

python rank.py RANK PROCESSES PORT NOTES RECIPE [--resume]
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    rank, processes, port, notes, recipe, *options = sys.argv[1:]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)

    from omni.training import run as runs
    from omni.training.recipe import Recipe
    from omni.training.trainer import OmniTrainer

    class Noting(OmniTrainer):
        """Writes down the answers of each batch before it is learnt."""

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            """Note, and learn."""
            tokenizer: Any = self.processing_class.tokenizer
            answers = [tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in inputs["labels"]]
            with Path(notes).open("a") as file:
                file.write(json.dumps([self.state.global_step, *answers]) + "\n")
            return super().training_step(model, inputs, *args, **kwargs)

    runs.OmniTrainer = Noting  # type: ignore[attr-defined]
    runs.run(Recipe.read(recipe), resume=bool(options))

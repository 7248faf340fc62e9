"""The curves of a run as one picture: losses, and the scores of evaluations."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_SCORES = ("loss", "runtime", "samples_per_second", "steps_per_second")


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw `Trainer.state.log_history` as a PNG. Nothing is written if no loss was logged or matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn(f"{path} is not drawn without matplotlib: pip install 'omni-thinker[train]'.", stacklevel=2)
        return
    losses = {
        name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in ("loss", "eval_loss")
    }
    names = dict.fromkeys(key for entry in history for key in entry if key.startswith("eval_"))
    scores = {
        name.removeprefix("eval_"): [(entry["step"], entry[name]) for entry in history if name in entry]
        for name in names
        if not name.endswith(NOT_SCORES)
    }
    if not losses["loss"]:
        return
    drawn = {"loss": losses, "score": scores} if scores else {"loss": losses}
    figure = Figure(figsize=(6.4 * len(drawn), 4.8), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (label, curves) in zip(panels, drawn.items(), strict=True):
        for name, points in curves.items():
            if points:
                panel.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
        panel.set(xlabel="step", ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    panels[0].set_yscale("log")
    if scores:
        panels[1].set_ylim(0, 1.02)
    figure.savefig(path, dpi=120)

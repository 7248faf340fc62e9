"""Runs a recipe with `transformers.Trainer`, and so under accelerate, torchrun, DDP or FSDP without a line of ours."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from omni.training.objectives import OBJECTIVES
from omni.training.optimizer import MuonAdamW, is_hidden_matrix
from omni.training.recipe import Optimizer, Recipe


def run(recipe: Recipe, resume: bool = False) -> Path:
    """Train what the recipe describes and return the folder of the finished checkpoint.

    Args:
        recipe: see `Recipe`.
        resume: go on from the last whole checkpoint of an earlier run of this recipe, if there is one.

    Raises:
        FileExistsError: the output folder holds a run already and `resume` is not set.
    """
    state = Path(recipe.output) / "run"
    last = get_last_checkpoint(str(state)) if state.is_dir() else None
    if last and not resume:
        raise FileExistsError(f"{state} holds an earlier run up to {Path(last).name}; resume it, or remove the folder.")
    arguments = TrainingArguments(output_dir=str(state), **recipe.arguments)
    set_seed(arguments.seed)
    objective = OBJECTIVES[recipe.objective](recipe)
    trainer = Trainer(
        model=objective.model,
        args=arguments,
        train_dataset=objective.train,
        eval_dataset=objective.evaluate,
        data_collator=objective.collate,
        compute_metrics=objective.metrics,
        preprocess_logits_for_metrics=objective.reduce_logits,
        processing_class=objective.processor,
        optimizers=(make_optimizer(objective.model, recipe.optimizer), None),
    )
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        objective.save(trainer.accelerator.unwrap_model(trainer.model), Path(recipe.output))
    return Path(recipe.output)


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Groups of parameters by learning rate and decay; vectors (norms, biases) never decay.

    Raises:
        ValueError: a pattern of `lr_scale` that matches no trainable parameter.
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    unused, seen = set(settings.lr_scale), set()
    heads = {id(p) for p in _output_heads(model)}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            patterns = [p for p in settings.lr_scale if re.search(p, f"{module_name}.{name}")]
            unused -= set(patterns)
            scale = settings.lr_scale[patterns[-1]] if patterns else 1.0
            matrix = settings.name == "muon" and is_hidden_matrix(module, name) and id(parameter) not in heads
            groups.setdefault((matrix, scale, parameter.ndim > 1), []).append(parameter)
    if unused:
        raise ValueError(f"Patterns of lr_scale that match no trainable parameter: {sorted(unused)}.")

    def made(matrix: bool) -> list[dict[str, Any]]:
        return [
            {"params": params, "lr": settings.lr * scale, "weight_decay": settings.weight_decay * decays}
            for (is_matrix, scale, decays), params in groups.items()
            if is_matrix == matrix
        ]

    return MuonAdamW(made(True), made(False)) if settings.name == "muon" else torch.optim.AdamW(made(False))


def _output_heads(model: nn.Module) -> list[nn.Parameter]:
    """Weights of output heads, which are classifiers, not hidden matrices."""
    heads: list[nn.Module] = list(getattr(model, "heads", {}).values())
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        heads.append(head)
    return [parameter for module in heads for parameter in module.parameters()]

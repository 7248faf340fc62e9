"""Checks of a small fused model with the encoder in it: the token plan, rows, answers, training, a fresh process."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from omni.contract.checks import BrokenError, Check
from omni.contract.subject import Subject
from omni.data.collate import ConversationCollator
from omni.data.conversations import Example, ask
from omni.fusion.encoded_item import EncodedItem
from omni.projectors import PROJECTORS, num_tokens

STEPS = 3
"""The number of training steps that must lower the loss."""


@torch.no_grad()
def plans_tokens(subject: Subject) -> None:
    """Each projector makes as many tokens as the token plan says, for each output that it may read."""
    name, modality = subject.name, subject.modality
    width, inputs = subject.encoder.config.hidden_size, subject.prepare(subject.items)
    items = subject.model.model.encode_items(name, **inputs)
    for output in modality.outputs:
        parts = output.split("+")
        for kind, projector_class in PROJECTORS.items():
            shapes = [item.grid_shape for item in items]
            folds = projector_class.uses_factor and ("grid" not in parts or modality.grid_dims == 1 or _even(shapes))
            factor = 2 if folds else 1
            projector = projector_class(width, 8, factor, modality.grid_dims, output)
            for item in items:
                tokens = {part: torch.as_tensor(item.tokens[part])[None] for part in parts}
                made, told = (
                    projector(tokens, item.grid_shape).shape[1],
                    num_tokens(output, kind, factor, item.grid_shape),
                )
                if made != told:
                    raise BrokenError(
                        f"The projector {kind} makes {made} tokens of {output!r}, but the token plan says {told} for a "
                        f"grid {item.grid_shape}; let `grid_shapes` count the tokens of `grid`."
                    )
    placeholders = (subject.batch(_rows(subject))["input_ids"] == subject.config.modalities[name]["token_id"]).sum(-1)
    used = [item for _, items in _rows(subject) for item in items]
    projected = subject.model.model.get_features(name, **subject.prepare(used)).pooler_output
    if int(placeholders.sum()) != sum(map(len, projected)):
        raise BrokenError(
            f"The processor writes {int(placeholders.sum())} placeholders, but the model makes {sum(map(len, projected))} "
            "tokens; let `grid_shapes` depend on configuration and inputs alone."
        )


def _even(shapes: Sequence[tuple[int, ...]]) -> bool:
    return not any(side % 2 for shape in shapes for side in shape)


def counts_placeholders(subject: Subject) -> None:
    """Processor and model refuse a wrong number of placeholders."""
    token, item = subject.modality.token, subject.items[0]
    for text, items in ((f"{token} {token}", [item]), ("what is that", [item]), (token, [])):
        try:
            subject.batch([(text, items)])
        except ValueError as error:
            if token not in str(error) or repr(subject.name) not in str(error):
                raise
            continue
        raise BrokenError(
            f"A prompt with {text.count(token)} placeholders and {len(items)} items is taken; let `prepare` and "
            "`grid_shapes` keep the number of items."
        )
    inputs = subject.batch([(f"what is {token}", [item])])
    here = (inputs["input_ids"] == subject.config.modalities[subject.name]["token_id"]).nonzero()[0]
    inputs["input_ids"][tuple(here)] = subject.tokenizer.eos_token_id
    try:
        with torch.no_grad():
            subject.model(**inputs)
    except ValueError:
        return
    raise BrokenError(
        "The model takes a prompt with a placeholder too few; let `grid_shapes` return the item's own grid."
    )


def _rows(subject: Subject) -> list[tuple[str, list[Any]]]:
    token, items = subject.modality.token, subject.items
    return [
        (f"which of these is it {token}{token}", [items[0], items[1]]),
        ("what is that", []),
        (f"{token} this one", [items[2]]),
    ]


@torch.no_grad()
def mixes_rows(subject: Subject) -> None:
    """Rows with two items, none and one have the same logits in one batch as alone."""
    rows = _rows(subject)
    inputs = subject.batch(rows)
    together = subject.model(**inputs).logits
    for number, row in enumerate(rows):
        alone = subject.model(**subject.batch([row])).logits[0]
        found = together[number][inputs["attention_mask"][number].bool()]
        if found.shape != alone.shape or not torch.allclose(found, alone, atol=1e-3, rtol=1e-3):
            raise BrokenError(
                f"Logits of a row with {len(row[1])} items differ between a batch and the row alone; let no item depend on "
                "the others, and let `grid_shapes` return each item's own grid."
            )


@torch.no_grad()
def leaves_text_alone(subject: Subject) -> None:
    """Text without items has the language model's own logits."""
    model = subject.model
    own = AutoModelForCausalLM.from_config(copy.deepcopy(subject.config.text_config)).eval()
    own.model.load_state_dict(model.model.language_model.state_dict())
    own.lm_head.load_state_dict(model.lm_head.state_dict())
    inputs = subject.batch([("what is that", []), ("which of these is it", [])])
    if not torch.allclose(model(**inputs).logits, own(**inputs).logits, atol=1e-4, rtol=1e-4):
        raise BrokenError(
            "With this encoder, the language model has other logits for text alone; do not change it or its embedding."
        )


def answers(subject: Subject) -> None:
    """Answers are the same in a batch as alone, and for encoded items as for raw ones; and they depend on the item."""
    rows = _rows(subject)
    inputs = subject.batch(rows, padding_side="left")
    together = _generate(subject, inputs)
    alone = [_generate(subject, subject.batch([row]))[0] for row in rows]
    if together != alone:
        raise BrokenError(
            "Answers in a batch differ from those of each row alone; let no item depend on the others of its batch."
        )
    raw = {key: inputs.pop(key) for key in subject.modality.inputs}
    with torch.no_grad():
        encoded: Mapping[str, list[EncodedItem]] = {subject.name: subject.model.model.encode_items(subject.name, **raw)}
    if _generate(subject, {**inputs, "mm_encoder_outputs": encoded}) != together:
        raise BrokenError(
            "Answers about encoded items differ from those about raw items; remove state from the encoder."
        )


def _generate(subject: Subject, inputs: Mapping[str, Any]) -> list[list[int]]:
    output = subject.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def learns(subject: Subject) -> None:
    """A few steps of training lower the loss."""
    model = copy.deepcopy(subject.model).train()
    conversation = ask("what is that", "this one", [subject.name])
    examples = [Example({subject.name: [item]}, [conversation]) for item in subject.items]
    inputs = ConversationCollator(subject.processor)(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tower = {f"model.{subject.name}_tower.{name}" for name, _ in subject.encoder.named_parameters()}
    losses = []
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and n not in tower]
            optimizer.step()
            losses.append(float(loss.detach()))
    if without:
        raise BrokenError(f"With this encoder, {without[0]} gets no gradient; do not detach the encoder's tokens.")
    if not all(map(torch.isfinite, map(torch.tensor, losses))) or losses[-1] >= losses[0]:
        raise BrokenError(
            f"{STEPS} steps of training change the loss from {losses[0]:.3f} to {losses[-1]:.3f}, expected less; let "
            "gradients through the encoder, and look for numbers that are not finite."
        )


FRESH = """
import json, sys, omni
from importlib.metadata import EntryPoint
from transformers import AutoModelForImageTextToText, AutoProcessor
given = json.loads(sys.argv[1])
if given["address"]:
    omni.register_modality(EntryPoint(name="", value=given["address"], group="").load())
from omni.registry import get_modality
model, processor = (auto.from_pretrained(given["folder"]) for auto in (AutoModelForImageTextToText, AutoProcessor))
modality = get_modality(given["modality"])
encoder, preprocessor = model.config.modalities[modality.name]["encoder"], processor.preprocessors[modality.name]
item = modality.open(given["file"]) if given["file"] else modality.probes(encoder, preprocessor)[0]
inputs = processor(text=f"what is {modality.token}", **{modality.argument: [item]}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(json.dumps(output[0, inputs["input_ids"].shape[1]:].tolist()))
"""


def starts_afresh(subject: Subject) -> None:
    """A new process loads the model with nothing but its folder and the installed package."""
    folder = subject.folder("fused")
    for part in (subject.model, subject.processor):
        part.save_pretrained(folder)
    file = str(subject.files[0].absolute()) if subject.files else None
    given = {"folder": str(folder), "address": subject.address, "modality": subject.name, "file": file}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)},
    )
    if run.returncode:
        said = (run.stderr.strip().splitlines() or ["nothing"])[-1].rstrip(".")
        raise BrokenError(
            f"A fresh process cannot load the model ({said}); name the bundle in the entry points of its package, and let "
            "its module import all that it needs."
        )
    token = subject.modality.token
    if (
        json.loads(run.stdout.splitlines()[-1])
        != _generate(subject, subject.batch([(f"what is {token}", subject.items[:1])]))[0]
    ):
        raise BrokenError("A fresh process gives another answer with the saved model; save all that answers depend on.")


CHECKS = (
    Check("token plan", "With every projector, an item becomes as many tokens as planned.", plans_tokens, ("shapes",)),
    Check("placeholders", "A wrong number of placeholders is refused.", counts_placeholders, ("token plan",)),
    Check("rows", "Rows with items and without share a batch.", mixes_rows, ("batch = single", "token plan")),
    Check("text alone", "Text alone gives the language model's own logits.", leaves_text_alone, ("encoder",)),
    Check("generate", "Answers in a batch and about encoded items are those of one row.", answers, ("rows",)),
    Check("training", "The loss falls, and gradients reach projector and Thinker.", learns, ("token plan",)),
    Check(
        "fresh process",
        "AutoModel and AutoProcessor load it in a new process.",
        starts_afresh,
        ("generate", "settings", "save and load"),
    ),
)

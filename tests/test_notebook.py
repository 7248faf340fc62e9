"""omni in Python and in notebooks: what is public, `load`, `ask` and `embed`, and the notebook of the documentation."""

import ast
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import omni
from omni.checkpoints.folder import CheckpointError
from omni.knowing.familiarity import Familiar
from omni.modality import ItemError
from omni.session import Session, answer
from omni.vision.pictures import read_picture

CHECKPOINT, ENCODER = Path("checkpoints/omni_tiny"), Path("checkpoints/vision_tiny")
SCENE, SECOND = "examples/scene.png", "examples/second.png"
QUESTION = "what color is the circle"


@pytest.fixture(scope="module")
def model() -> omni.Loaded:
    return omni.load(CHECKPOINT)


def test_a_reply_has_the_words_and_shows_what_they_are_about(model: omni.Loaded) -> None:
    reply = model.ask(SCENE, QUESTION)
    wanted = answer(model.model, model.processor, [SCENE], QUESTION)
    assert (str(reply), reply.answer, reply.details.tokens_read) == ("red", wanted.answer, wanted.tokens_read)
    assert repr(reply).startswith(f"Reply('red' to '{QUESTION}', about picture")
    assert (reply.confidence, wanted.confidence) == (reply.details.confidence, reply.confidence)
    page = reply._repr_html_()
    assert page.count('<img src="data:image/png;base64,') == 1
    assert "<strong>red</strong>" in page
    assert "&lt;b&gt;" in model.ask(SCENE, "<b>?")._repr_html_(), "a question is text in a page"
    assert len(model.ask([SCENE, read_picture(SECOND)], QUESTION).items) == 2
    assert omni.ask(SCENE, QUESTION, model).answer == "red"


def test_a_reply_says_how_sure_it_is_and_what_is_unlike_training(model: omni.Loaded) -> None:
    reply = model.ask(SCENE, QUESTION)
    known: dict[str, Any] = {"confidence": 0.25, "familiar": Familiar(items=[False], question=True)}
    strange = replace(reply, details=reply.details.model_copy(update=known))
    assert (strange.confidence, strange.note) == (0.25, known["familiar"].note(["image"]))
    assert strange.note is not None
    assert repr(strange).endswith(", sure to 0.25)")
    assert f"sure to 0.25; {strange.note}" in strange._repr_html_()
    unknown = replace(reply, details=reply.details.model_copy(update={"confidence": None, "familiar": None}))
    assert (unknown.confidence, unknown.note) == (None, None)
    assert "sure" not in unknown._repr_html_() + repr(unknown)


def test_vectors_are_those_of_the_encoder_alone(model: omni.Loaded) -> None:
    from transformers import AutoModel

    reference, processor = AutoModel.from_pretrained(ENCODER).eval(), omni.OmniImageProcessor.from_pretrained(ENCODER)
    with torch.no_grad():
        wanted = reference(**processor([read_picture(SCENE), read_picture(SECOND)], return_tensors="pt")).cls[:, 0]
    found = omni.embed([SCENE, SECOND], ENCODER)
    assert found == pytest.approx(wanted.numpy(), abs=1e-3)
    assert omni.embed(SCENE, ENCODER) == pytest.approx(wanted[0].numpy(), abs=1e-3)
    unit = model.embed([SCENE, SECOND], normalize=True)
    assert np.linalg.norm(unit, axis=1) == pytest.approx([1, 1], abs=1e-6)


def test_what_cannot_be_asked_or_embedded_is_said(model: omni.Loaded) -> None:
    encoder = omni.load(ENCODER)
    with pytest.raises(CheckpointError, match="holds an encoder, expected a model that answers; use `embed`"):
        encoder.ask(SCENE, QUESTION)
    with pytest.raises(ItemError, match="does not exist"):
        model.ask("no.png", QUESTION)
    with pytest.raises(ItemError, match="Expected items of one modality, found nothing"):
        model.embed([])
    with pytest.raises(CheckpointError):
        omni.load("no/such/folder")


def test_the_maps_are_those_of_the_command(model: omni.Loaded) -> None:
    """`docs/circle.png` is what `omni attend` draws."""
    drawn, kept = model.attend(SCENE, QUESTION), Image.open("docs/circle.png").convert("RGB")
    assert drawn.size == kept.size
    assert np.abs(np.asarray(drawn.convert("RGB"), float) - np.asarray(kept, float)).mean() < 1
    assert omni.load(ENCODER).attend(SCENE).width > 224


def test_objects_say_what_they_are(model: omni.Loaded) -> None:
    encoder = omni.load(ENCODER)
    assert "a model that answers about " in repr(model)
    assert repr(encoder).startswith("Loaded('checkpoints/vision_tiny': an encoder of pictures, ")
    assert model._repr_html_().startswith("<p>Loaded(")
    session = model.session([SCENE, SECOND])
    assert isinstance(session, Session)
    assert repr(session) == "Session(2 pictures)"


def test_what_is_public_is_listed_and_help_is_one_screen(python: Callable[..., Any]) -> None:
    """In a process of its own: `help` loads every public name."""
    code = "import pydoc, omni; print(len(pydoc.render_doc(omni).splitlines())); print(*dir(omni))"
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    lines, names = run.stdout.splitlines()
    assert int(lines) < 75
    assert {"load", "ask", "embed", "Modality", "OmniModel"} <= {*names.split()}
    assert all(not name.startswith("_") and hasattr(omni, name) for name in names.split())
    assert not {"Any", "find_spec"} & {*names.split()}


# --- The notebook -----------------------------------------------------------------------------------------------------

NOTEBOOK = Path("docs/notebook.ipynb")


def execute(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last expression, as a notebook shows it."""
    tree = ast.parse(cell)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def steady(text: str) -> str:
    """Without what another training of the shipped checkpoint changes: its size, and how sure it is."""
    return re.sub(r"[\d,]{5,}|, sure to [\d.]+", "", text)


def test_the_notebook_of_the_documentation_shows_what_its_cells_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.getcwd())
    names: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            value = execute("".join(cell["source"]), names)
            shown = ["".join(output["data"]["text/plain"]) for output in cell["outputs"]]
            found = [] if value is None else [repr(value)]
            assert [*map(steady, shown)] == [*map(steady, found)], "".join(cell["source"])
            pages = [output["data"].get("text/html") for output in cell["outputs"]]
            assert [page is not None for page in pages] == [hasattr(value, "_repr_html_")] * len(pages)

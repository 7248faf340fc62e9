"""Checks of omni's doors: the commands and functions that take items, files or models must take this modality, too.

A check calls a door as its command does. A door that takes files is tried only if the author passes one (`--file`).
"""

import base64
import json
from pathlib import Path
from typing import Any

import torch

from omni.contract.checks import BrokenError, Check, NotOfferedError, NotRunError
from omni.contract.subject import Subject
from omni.items import Item, read_item
from omni.loading.checkpoint import load
from omni.loading.preprocessor import save_preprocessor
from omni.session import Session

QUESTION = "which of these is it"


def _folder(subject: Subject) -> Path:
    """The folder of the fused model. Its configuration says that all parts are trained."""
    folder = subject.folder("fused")
    if not (folder / "config.json").is_file():
        subject.model.save_pretrained(folder)
        subject.processor.save_pretrained(folder)
    return folder


def _encoder_folder(subject: Subject) -> Path:
    """A folder with the encoder and its preprocessor alone."""
    folder = subject.folder("encoder-alone")
    subject.encoder.save_pretrained(folder)
    save_preprocessor(subject.processor.preprocessors[subject.name], folder)
    return folder


def _file(subject: Subject) -> Path:
    if subject.modality.open is None:
        raise NotOfferedError("`open`: with it, this door takes files of this modality.")
    if not subject.files:
        raise NotRunError("This door takes files; pass one with --file.")
    return subject.files[0]


def _item(subject: Subject, number: int = 0) -> Item:
    return Item(subject.name, subject.items[number])


def _rows(subject: Subject) -> Path:
    """A manifest of two rows, with a column for the modality."""
    file, path = _file(subject), subject.folder("rows") / "rows.jsonl"
    other = subject.files[-1]
    rows = [
        {subject.name: str(each.absolute()), "question": QUESTION, "answer": f"this one {number}"}
        for number, each in enumerate((file, other))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reads_files(subject: Subject) -> None:
    """`read_item`, which every door calls."""
    for source in (str(_file(subject)), _file(subject).read_bytes()):
        if (found := read_item(source)).modality != subject.name:
            raise BrokenError(
                f"The file {_file(subject).name!r} is read as an item of {found.modality!r}; let `suffixes` and `open` tell "
                "it apart."
            )


def asks(subject: Subject) -> None:
    """`omni ask`."""
    session = Session(subject.model, subject.processor, [_item(subject), _item(subject, 1)])
    first, second = (session.ask(QUESTION, max_new_tokens=4) for _ in range(2))
    if first.answer != second.answer:
        raise BrokenError("The same question gets another answer the second time; remove state from the encoder.")


def attends(subject: Subject) -> None:
    """`omni attend` with a question: maps over the places of an item."""
    from omni.looking.attention import word_attention

    if "grid" not in subject.output:
        raise NotOfferedError("an output 'grid': with it, `omni attend` shows where the Thinker looks.")
    found = word_attention(subject.model, subject.processor, [_item(subject)], QUESTION, max_new_tokens=4)
    (shape,) = subject.shapes(subject.prepare([subject.items[0]]))
    if found.maps[0].shape[1:] != shape:
        raise BrokenError(
            f"A map has the shape {found.maps[0].shape[1:]}, and the grid {shape}; correct `grid_shapes`."
        )


def embeds(subject: Subject) -> None:
    """`omni embed`: vectors of a fused model's encoder."""
    from omni.embedding.engine import Engine
    from omni.loading.encoder import load_encoder

    engine = Engine(load_encoder(_folder(subject)), what=subject.output.split("+")[0])  # type: ignore[arg-type]
    (row,) = engine([engine.prepare(subject.items[0])])
    if row.shape[-1] != subject.encoder.config.hidden_size:
        raise BrokenError(f"An embedding has {row.shape[-1]} numbers; expected `hidden_size` of them.")


def checks_data(subject: Subject) -> None:
    """`omni check-data`: rows with a column of its name."""
    from omni.data.checking import check
    from omni.data.manifests import Manifest

    report = check({"rows": Manifest.read(_rows(subject))}, subject.processor, workers=1)
    if not report.clean:
        raise BrokenError(f"`omni check-data` finds in a good file: {report.problems[0].sentence}")


def evaluates(subject: Subject) -> None:
    """`omni evaluate`: rows with a column of its name."""
    from omni.evaluation.asking import ask_all
    from omni.evaluation.manifest import ManifestQuestions

    questions = ManifestQuestions(_rows(subject))
    asked = ask_all(subject.model, subject.processor, questions, max_new_tokens=4)
    if len(asked) != len(questions):
        raise BrokenError(f"Of {len(questions)} questions {len(asked)} are answered.")


def trains(subject: Subject) -> None:
    """`omni train`: rows with a column of its name become a batch."""
    from omni.data.collate import ConversationCollator
    from omni.data.manifests import Manifest, ManifestConversations

    examples = ManifestConversations(Manifest.read(_rows(subject)))
    inputs = ConversationCollator(subject.processor)([examples[number] for number in range(len(examples))])
    with torch.no_grad():
        if not subject.model(**inputs).loss.isfinite():
            raise BrokenError("The loss of a row is not finite; look for a division by zero in the encoder.")


def composes(subject: Subject) -> None:
    """`omni compose`: its encoder and a language model, each from a folder."""
    from transformers import AutoModelForCausalLM

    from omni.exchange.compose import compose

    thinker = subject.folder("thinker")
    AutoModelForCausalLM.from_config(subject.config.text_config).save_pretrained(thinker)
    subject.tokenizer.save_pretrained(thinker)
    compose(_encoder_folder(subject), thinker)


def inspects(subject: Subject) -> None:
    """`omni inspect`: the layers of its encoder."""
    from omni.looking.layers import inspect_encoder

    found = inspect_encoder(_encoder_folder(subject))
    own = sum(parameter.numel() for parameter in subject.encoder.parameters())
    if found.parameters != own:
        raise BrokenError(f"`omni inspect` counts {found.parameters:,} parameters, and the encoder has {own:,}.")


def exports(subject: Subject) -> None:
    """`omni export`: graphs of the fused model."""
    from omni.exchange.onnx import DifferenceError, ExportError, MissingPackageError, export

    try:
        export(_folder(subject), subject.folder("exports") / "onnx")
    except MissingPackageError as error:
        raise NotRunError(f"`omni export` says: {error}") from error
    except DifferenceError as error:
        raise BrokenError(f"`omni export` says: {error}") from error
    except ExportError as error:  # not every encoder can be a graph
        raise NotOfferedError(
            f"graphs: with them, this encoder runs without torch. `omni export` says: {error}"
        ) from error


def serves(subject: Subject) -> None:
    """`omni serve`: an upload of its media type."""
    if not subject.modality.media_types:
        raise NotOfferedError("`media_types`: with them, `omni serve` takes uploads of this modality.")
    file = _file(subject)
    try:
        from omni.serving.requests import Chat
        from omni.serving.worker import Worker
        from omni.serving.writing import Job
    except ImportError as error:
        raise NotRunError(f"The server needs more packages ({error}): pip install 'omni-thinker[serve]'.") from error
    address = f"data:{subject.modality.media_types[0].replace('*', file.suffix[1:])};base64,"
    address += base64.b64encode(file.read_bytes()).decode()
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": address}}]
    content.append({"type": "text", "text": QUESTION})
    chat = Chat.model_validate({"messages": [{"role": "user", "content": content}], "max_tokens": 1})
    worker = Worker(subject.model, subject.processor)
    try:
        worker.answer(Job(chat))
    finally:
        worker.close()


def loads(subject: Subject) -> None:
    """`load`, which every command with a checkpoint calls."""
    model, processor = load(_folder(subject))
    pairs = ((model, processor), (subject.model, subject.processor))
    asked = [Session(*pair, [_item(subject)]).ask(QUESTION, 4) for pair in pairs]
    if asked[0].answer != asked[1].answer:
        raise BrokenError(
            "A loaded model gives another answer than the one that was saved; save everything that answers depend on."
        )


NEEDS = ("generate", "settings")

CHECKS = (
    Check("load", "A folder becomes the model that was saved.", loads, (*NEEDS, "save and load")),
    Check("read_item", "A file is recognised by what it holds.", reads_files, ("files",)),
    Check("ask", "`omni ask` answers about items.", asks, NEEDS),
    Check("attend", "`omni attend` maps the places of an item.", attends, NEEDS),
    Check("embed", "`omni embed` makes vectors of items.", embeds, NEEDS),
    Check("check-data", "`omni check-data` reads rows that name its files.", checks_data, (*NEEDS, "files")),
    Check("evaluate", "`omni evaluate` asks about rows that name its files.", evaluates, (*NEEDS, "files")),
    Check("train", "`omni train` reads rows that name its files.", trains, (*NEEDS, "files")),
    Check("compose", "`omni compose` joins its encoder to a language model.", composes, NEEDS),
    Check("inspect", "`omni inspect` lists the layers of its encoder.", inspects, ("encoder", "settings")),
    Check("export", "`omni export` makes graphs of a model with it.", exports, NEEDS),
    Check("serve", "`omni serve` takes uploads of its media types.", serves, (*NEEDS, "files")),
)

"""A result as a table: for the terminal, and as a section of a model card."""

import re
from pathlib import Path

from rich.table import Table

from omni.files import expect_ordinary, write_text_whole
from omni.registry import get_modality

from .result import Result
from .scores import SIGHTS, EvaluationError, Score
from .settings import ClassSettings, EncoderSettings, PictureSettings, Probing

SAID_CONFUSIONS = 5

START, END = "<!-- omni evaluate -->", "<!-- end of omni evaluate -->"
"""The marks around the section that `omni evaluate --card` writes into a model card."""


def tabulate(result: Result) -> list[list[str]]:
    """The scores as lines of cells, the header first. The first column holds names."""
    if isinstance(result.settings, Probing):
        return _by_output(result.scores)
    if isinstance(result.settings, ClassSettings):
        return _by_class(result)
    tests = result.sight_tests
    without = {
        sight if len(tests) == 1 else f"{sight} {get_modality(name).noun}": {s.kind: s for s in test.scores[sight]}
        for name, test in tests.items()
        for sight in SIGHTS
        if sight in test.scores
    }
    header = ["kind", "n", "exact match", "95 % interval", "best constant answer", *without]
    rows = [
        [
            s.kind,
            f"{s.n:,}",
            f"{s.accuracy:.3f}",
            f"{s.low:.3f} - {s.high:.3f}",
            _constant(s),
            *(f"{scores[s.kind].accuracy:.3f}" for scores in without.values()),
        ]
        for s in result.scores
    ]
    return [header, *rows]


def _by_output(scores: list[Score]) -> list[list[str]]:
    """Scores of the kinds "task / method / output", with the outputs side by side."""
    outputs = list(dict.fromkeys(s.kind.rpartition(" / ")[2] for s in scores))
    rows: dict[str, dict[str, Score]] = {}
    for s in scores:
        row, _, output = s.kind.rpartition(" / ")
        rows.setdefault(row, {})[output] = s
    cells = []
    for row, found in rows.items():
        any_of_them = next(iter(found.values()))
        by_output = [
            f"{found[output].accuracy:.3f} ({found[output].low:.2f}-{found[output].high:.2f})"
            if output in found
            else ""
            for output in outputs
        ]
        cells.append([row, f"{any_of_them.n:,}", *by_output, _constant(any_of_them)])
    return [["task / method", "n", *outputs, "best constant answer"], *cells]


def _by_class(result: Result) -> list[list[str]]:
    """The score of all items, with that of the best constant answer, and a line for each class."""
    rows = [
        [f"all ({s.kind})", f"{s.n:,}", *_with_interval(s.accuracy, s.low, s.high), "", _constant(s)]
        for s in result.scores
    ]
    for each in result.classes:
        precision = "" if each.precision is None else f"{each.precision:.3f}"
        rows.append([each.name, f"{each.n:,}", *_with_interval(each.recall, each.low, each.high), precision, ""])
    return [["class", "n", "recognised", "95 % interval", "precision", "best constant answer"], *rows]


def _with_interval(share: float, low: float, high: float) -> list[str]:
    return [f"{share:.3f}", f"{low:.3f} - {high:.3f}"]


def _constant(found: Score) -> str:
    return f"{found.constant:.3f} ({found.constant_answer})"


def title(result: Result) -> str:
    """The checkpoint, and what it was asked."""
    return f"{result.checkpoint}: {result.settings.title}"


def remarks(result: Result) -> list[str]:
    """Sentences that explain the table to its reader."""
    found = []
    if isinstance(result.settings, EncoderSettings):
        found.append(
            "cls is the encoder's CLS vector, grid the mean of its grid; intervals are 95 %. Classifiers are fitted on "
            "other pictures. same objects: find a scene by a second drawing of it. digit: scans of 8 x 8 pixels. "
            "projection: random projections of their pixels to the same width. untrained: the encoder with random weights."
        )
    if result.confusions:
        largest = [
            f"{each.n:,} of {each.of:,} {each.expected!r} taken for {each.answer!r}"
            for each in result.confusions[:SAID_CONFUSIONS]
        ]
        found.append(f"Largest confusions: {'; '.join(largest)}.")
    if isinstance(result.settings, PictureSettings):
        found.append(
            "cls is the encoder's CLS vector, grid the mean of its grid; intervals are 95 %. same label: the nearest "
            "picture of the other groups has the label. kind: the nearest one with another label is of the same kind. "
            "near-duplicate: the nearest of all pictures is the one that was copied. untrained: the encoder with random "
            "weights. pixels: 16 x 16 of them."
        )
    if result.stopped:
        found.append(f"{result.stopped:,} answers were stopped before they ended.")
    if (sure := result.reliability) is not None:
        found.append(
            f"Of {sure.n:,} answers {sure.accuracy:.3f} are right; the model's mean confidence is {sure.confidence:.3f}; "
            f"calibration error {sure.error:.3f}."
        )
    for each in result.strangers:
        what = f"{each.n:,} strange {each.kind}s{f' ({each.group})' if each.group else ''}"
        found.append(
            f"Of {what} {each.found:.3f} are recognised, with {each.false_alarms:.3f} false alarms among {each.alike:,} "
            f"of the evaluation; area under the ROC curve {each.area:.3f}."
        )
    for name, test in result.sight_tests.items():
        real, what = test.overall["real"], f"{get_modality(name).noun}s"
        others = [f"{_share(s)} with {shown} {what}" for shown, s in test.overall.items() if shown != "real"]
        found.append(
            f"Sight test {'passed' if test.passed else 'FAILED'}: over all {real.n:,} questions {_share(real)} with "
            f"the real {what}, {', '.join(others)}; {real.constant:.3f} by the best constant answer of each kind."
        )
        found += [f"The sight test left out {shown} {what}: {why}." for shown, why in test.left_out.items()]
    if (spoken := result.language) is not None:
        found.append(
            f"Language test: {spoken.same} of {spoken.n} text-only answers are those of the language model alone; "
            f"perplexity of a page of prose {spoken.perplexity:.4g}, {spoken.perplexity_alone:.4g} alone."
        )
    return found


def _share(found: Score) -> str:
    return f"{found.accuracy:.3f} ({found.low:.3f} - {found.high:.3f})"


def render(result: Result) -> Table:
    """The scores as a table for the terminal."""
    header, *rows = tabulate(result)
    table = Table(title=title(result), caption="\n".join(remarks(result)) or None, caption_justify="left")
    for place, column in enumerate(header):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


# --- Model cards ------------------------------------------------------------------------------------------------------


def model_card_section(result: Result) -> str:
    """The result as Markdown: what was measured, with which versions and hashes, the scores, the sight test."""
    header, *rows = tabulate(result)
    right = ["---", *["---:"] * (len(header) - 1)]
    versions = ", ".join(f"{name} {result.versions[name]}" for name in ("omni", "transformers", "torch"))
    lines = [
        f"## Evaluation: {_escaped(title(result))}",
        "",
        f"Measured on {result.date[:10]} with {versions}, on {result.device}; sha256 of the weights "
        f"`{result.hashes.weights[:12]}`, of the data `{result.hashes.data[:12]}`. Intervals are 95 % (Wilson). The best "
        "constant answer is the score of always giving the same answer.",
        "",
        *("| " + " | ".join(map(_escaped, row)) + " |" for row in (header, right, *rows)),
    ]
    for remark in remarks(result):
        lines += ["", _escaped(remark)]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text for a cell of Markdown. Nothing in it acts as markup, or ends the section."""
    return re.sub(r"([\\|<>`*_\[\]])", r"\\\1", " ".join(text.split()))


def update_card(path: str | Path, result: Result) -> None:
    """Put the section of a result into a model card: in the place of an earlier section, or at the end.

    Raises:
        EvaluationError: the file cannot be read, or the marks of an earlier section do not stand in it once each, in order.
    """
    card = Path(path)
    text = read_card(card)
    section = f"{START}\n{model_card_section(result)}{END}\n"
    before, marker, rest = text.partition(START)
    if marker:
        after = rest.partition(END)[2].removeprefix("\n")
        write_text_whole(card, before + section + after)
    else:
        write_text_whole(card, (text.rstrip("\n") + "\n\n" if text.strip() else "") + section)


def read_card(path: str | Path) -> str:
    """The text of a model card that can take a section. Raises the errors of `update_card`."""
    try:
        text = expect_ordinary(Path(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise EvaluationError(
            f"The model card {str(path)!r} cannot be read ({reason}); expected an existing README.md, so write one first."
        ) from error
    found = (text.count(START), text.count(END))
    if found not in ((0, 0), (1, 1)) or (found == (1, 1) and text.index(START) > text.index(END)):
        raise EvaluationError(
            f"Expected {START!r} and then {END!r} in the model card {str(path)!r}, once each or not at all; found them "
            f"{found[0]} and {found[1]} times, or in the other order; remove the rest of the earlier section."
        )
    return text

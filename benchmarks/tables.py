"""The outcome of a race as a table for the terminal, and as a part of the JSON document."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.measure import Outcome, Ratio, Result


def table(job: str, outcome: Outcome) -> Table:
    """A race as a table: the fastest first, omni in bold. Below it stands what did not run, and why."""
    race, peer = outcome.race, outcome.fastest_peer
    entrants = outcome.entrants
    columns = {"contestant": "left", "median": "right", "quartiles": "right"}
    if race.items:
        columns[f"{race.unit}/s"] = "right"
    columns["x fastest peer's " + ("rate" if race.items else "time")] = "right"
    if not race.items:
        columns["more than it"] = "right"
    if outcome.ceiling:
        columns["of the ceiling"] = "right"
    if any(each.difference is not None for each in entrants):
        columns["difference"] = "right"
    made = Table(title=f"{job}: {race.title}", caption="\n".join(_notes(outcome)), caption_justify="left")
    for name, justify in columns.items():
        made.add_column(name, justify=justify, no_wrap=name != "contestant")  # type: ignore[arg-type]
    for each in entrants:
        cells = {"contestant": escape(each.contestant.name), "median": "did not run"}
        if each.seconds:
            low, high = each.quartiles
            cells |= {
                "median": _time(each.median),
                "quartiles": f"{_time(low)} - {_time(high)}",
                f"{race.unit}/s": f"{race.items / each.median:,.4g}",
                "x fastest peer's " + ("rate" if race.items else "time"): _ratio(outcome.ratio(each)),
                "more than it": _time(each.median - peer.median) if peer else "",
                "of the ceiling": f"{share:.2f}" if (share := outcome.share(each)) else "",
            }
        if each.difference is not None:
            cells["difference"] = f"{each.difference:.1e}"
        made.add_row(*(cells.get(name, "") for name in columns), style="bold" if each.contestant.ours else "")
    return made


def _notes(outcome: Outcome) -> list[str]:
    notes = []
    if (parts := outcome.parts) and (ceiling := outcome.ceiling):
        flops = sum(part.times * part.flops for part in parts)
        notes.append(
            f"Ceiling: {flops / ceiling / 1e9:,.0f} GFLOP/s, {outcome.race.items / ceiling:,.0f} {outcome.race.unit}/s; "
            "the fastest way of each part, in GFLOP/s: "
            + "; ".join(
                f"{escape(best.contestant.name)} {part.flops / best.median / 1e9:,.0f}" for part, best in parts.items()
            )
        )
    reasons: dict[str, list[str]] = {}
    for each in outcome.results:
        if each.reason:
            reasons.setdefault(each.reason, []).append(each.contestant.name)
    return [*notes, *(escape(f"{'; '.join(names)}: {reason}") for reason, names in reasons.items())]


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if abs(seconds) >= 1 else f"{seconds * 1e3:.2f} ms"


def _ratio(ratio: Ratio | None) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f} - {ratio.high:.2f})" if ratio else ""


def document(outcome: Outcome) -> dict[str, Any]:
    """A race as JSON, with every measurement, so that readers can compute their own statistics."""
    race, peer, parts, ceiling = outcome.race, outcome.fastest_peer, outcome.parts, outcome.ceiling
    return {
        "title": race.title,
        "items": race.items,
        "unit": race.unit,
        "fastest_peer": peer.contestant.name if peer else None,
        "ceiling": parts
        and ceiling
        and {
            "seconds": ceiling,
            "gflops": sum(part.times * part.flops for part in parts) / ceiling / 1e9,
            "rate": race.items / ceiling,
        },
        "contestants": [_entry(outcome, each) for each in outcome.results],
    }


def _entry(outcome: Outcome, result: Result) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": result.contestant.name, "ours": result.contestant.ours}
    if result.contestant.part:
        entry["part"] = result.contestant.part.name
    if result.reason:
        return {**entry, "reason": result.reason}
    entry |= {"median": result.median, "quartiles": result.quartiles, "seconds": result.seconds}
    if result.contestant.part:
        return entry
    if ratio := outcome.ratio(result):
        entry |= {"ratio": ratio.value, "ratio_95": [ratio.low, ratio.high]}
    if outcome.race.items:
        entry["rate"] = outcome.race.items / result.median
    if share := outcome.share(result):
        entry["share"] = share
    if result.difference is not None:
        entry["difference"] = result.difference
    return entry

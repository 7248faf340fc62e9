"""JSON files of checkpoints with values that are none: each loads, or is refused in a sentence, soon.

A value anywhere in a file becomes one of another kind or size, or goes; the folder is sealed again, as if that were meant.
Those that load count as unchanged.
"""

import copy
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from campaigns.flips import make, quiet
from campaigns.tally import Tally

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    -(10**9),
    5 * 10**4,
    10**9,
    10**20,
    0.5,
    -1e300,
    float("nan"),
    float("inf"),
]
VALUES += [
    "",
    "x",
    "../x",
    "\ud800",
    "x" * 5000,
    [],
    [1],
    ["x"] * 3,
    [[]],
    {},
    {"x": 1},
    {"": {}},
    {"model_type": "llama"},
]
GONE = object()
FILES = ("config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json")
FOLDERS = ("omni_tiny", "learnt")
LONG = 20.0
"""Seconds after which somebody would think that it hangs; loading takes a tenth of one."""


def run(seed: int, count: int, seconds: float) -> Tally:
    """Change so many values, one at a time, or as many as there is time for."""
    end, chance = time.monotonic() + seconds, random.Random(seed)
    tried = refused = loaded = 0
    fell_through = []
    with TemporaryDirectory() as place, quiet():
        folders = [Path(place) / name for name in FOLDERS]
        for folder in folders:
            make(folder)
        while tried < count and time.monotonic() < end:
            folder, name = chance.choice(folders), chance.choice(FILES)
            whole = (folder / name).read_text(encoding="utf-8")
            values = json.loads(whole)
            path = chance.choice([*paths(values)])
            value = chance.choice([*VALUES, GONE])
            (folder / name).write_text(json.dumps(changed(values, path, value)), encoding="utf-8")
            tried += 1
            outcome = attempt(folder)
            refused += outcome == "refused"
            loaded += outcome == "loaded"
            if outcome not in ("refused", "loaded"):
                said = "gone" if value is GONE else repr(value)[:60]
                where = f"{folder.name}/{name} {'.'.join(map(str, path))}"
                fell_through.append(f"shapes, seed {seed}: {where} {said}: {outcome}")
            (folder / name).write_text(whole, encoding="utf-8")
    return Tally(tried, refused, loaded, tuple(fell_through))


def paths(values: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value in a JSON document."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*before, key)
        yield from paths(value, (*before, key))


def changed(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with one value replaced, or gone."""
    values = inner = copy.deepcopy(values)
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return values


def attempt(folder: Path) -> str:
    """What becomes of a folder: "loaded", "refused", or what went wrong."""
    from omni.checkpoints.folder import CheckpointError
    from omni.checkpoints.seal import reseal
    from omni.loading.checkpoint import load

    start = time.monotonic()
    try:
        reseal(folder)
        load(folder)
        outcome = "loaded"
    except CheckpointError as error:
        outcome = str(error) if "allocate memory" in str(error) else "refused"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return outcome if time.monotonic() - start < LONG else f"{outcome} after {time.monotonic() - start:.0f} s"

"""Wrong values in the JSON files of checkpoints: each loads, or is refused in a sentence, within seconds.

A value anywhere in a file is replaced by one of another kind or size, or removed. The folder is then sealed, as if the
change were intended. Folders that load count as unchanged.
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
"""Seconds after which a user would think that it hangs; loading takes a tenth of a second."""


def run(seed: int, count: int, seconds: float) -> Tally:
    """Change `count` values, or as many as fit into the time, one at a time."""
    end, chance = time.monotonic() + seconds, random.Random(seed)
    tried = refused = loaded = 0
    failures = []
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
                failures.append(f"shapes, seed {seed}: {where} {said}: {outcome}")
            (folder / name).write_text(whole, encoding="utf-8")
    return Tally(tried, refused, loaded, tuple(failures))


def paths(values: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*before, key)
        yield from paths(value, (*before, key))


def changed(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document with one value replaced, or removed for `GONE`."""
    values = inner = copy.deepcopy(values)
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return values


def attempt(folder: Path) -> str:
    """The outcome of loading a folder: "loaded", "refused", or what is wrong."""
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

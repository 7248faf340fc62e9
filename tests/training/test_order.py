"""The order of examples: each once, near those that are read with it, in lanes, mixed by weight, the same when resumed."""

import io
import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from omni.data.arrow import WINDOW
from omni.training.order import Mixed, Order
from omni.training.recipe import Recipe, RecipeError
from omni.training.run import run


class Rows:
    """Examples that are their own numbers."""

    def __init__(self, blocks: list[int] | None, count: int = 0, first: int = 0) -> None:
        self.blocks, self.count, self.first = blocks, sum(blocks) if blocks else count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return self.first + index


BLOCKS = [7, 3, 10, 1, 4, 9, 8, 2, 6, 5, 11, 7, 3, 3, 5]
BLOCK = np.repeat(np.arange(len(BLOCKS)), BLOCKS)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("batch", [1, 4])
def test_an_epoch_has_every_example_once(lanes: int, batch: int) -> None:
    order = Order(Rows(BLOCKS), batch, lanes, seed=3)
    for _ in range(2):
        assert sorted(order) == list(range(sum(BLOCKS)))
    assert len(order) == sum(BLOCKS)


def test_a_worker_reads_blocks_of_its_own_and_a_few_at_a_time() -> None:
    """A process of three gets its batches as accelerate deals them."""
    batches = BatchSampler(Order(Rows([6] * 15), 2, 3, seed=0), 2, drop_last=False)
    came = []
    for process in range(3):
        order = batches.sampler
        assert isinstance(order, Order)
        order.epoch = 0
        came.append(np.ravel([*BatchSamplerShard(batches, 3, process)]) // 6)  # blocks of 30 examples
    assert sorted({*came[0]} | {*came[1]} | {*came[2]}) == list(range(15))
    assert [len({*each}) for each in came] == [5, 5, 5]
    for each in came:
        places = [np.flatnonzero(each == block) for block in np.unique(each)]
        at_once = [sum(found[0] <= place <= found[-1] for found in places) for place in range(30)]
        assert max(at_once) <= WINDOW


def test_the_order_follows_from_seed_and_epoch() -> None:
    def orders(seed: int, epochs: int) -> list[list[int]]:
        order = Order(Rows(BLOCKS), 4, 2, seed)
        return [list(order) for _ in range(epochs)]

    first, second = orders(1, 2)
    assert orders(1, 2) == [first, second]
    assert first != second
    assert orders(2, 1)[0] != first
    later = Order(Rows(BLOCKS), 4, 2, 1)
    later.epoch = 1
    assert list(later) == second
    inside = [BLOCK[one] == BLOCK[other] for one, other in pairwise(first)]
    assert np.mean(inside) < 0.6, "rows of a block do not come one after the other"


@pytest.mark.parametrize("lanes", [1, 3])
def test_sources_mix_by_weight_and_start_again_at_their_end(lanes: int) -> None:
    """Expected are draws with replacement of the source; within 4 standard deviations."""
    few, many, single = Rows([5, 5]), Rows(None, 2000), Rows([1])
    mixed = Mixed([few, many, single], [1.0, 2.0, 1.0])
    drawn = [*Order(mixed, 4, lanes, seed=0)]
    assert len(drawn) == len(mixed) == 2011
    counts = Counter("few" if index < 10 else "many" if index < 2010 else "single" for index in drawn)
    for name, share in (("few", 0.25), ("many", 0.5), ("single", 0.25)):
        assert abs(counts[name] - 2011 * share) < 4 * np.sqrt(2011 * share * (1 - share))
    repeats = Counter(index for index in drawn if 10 <= index < 2010)
    assert max(repeats.values()) == 1, "no row comes again before all have come"
    if lanes == 1:
        assert max(times := [*Counter(index for index in drawn if index < 10).values()]) - min(times) <= 1
    assert [mixed[index] for index in (0, 10, 2010)] == [0, 0, 0]


# --- Training ---------------------------------------------------------------------------------------------------------


def shards(folder: Path, count: int = 24) -> Path:
    """Pictures of one colour and what it is called, in row groups of three."""
    held = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), ("red", "blue")[number % 2]).save(buffer, "PNG")
        held.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"image": held, "caption": [("red", "blue")[number % 2] for number in range(count)]})
    folder.mkdir()
    for part in range(2):
        half = table.slice(part * count // 2, count // 2)
        pq.write_table(half, folder / f"{part}.parquet", row_group_size=3)
    return folder


def recipe(small: Path, train: Any, output: Path, **arguments: Any) -> Recipe:
    settings = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "seed": 5,
        "report_to": "none",
        **arguments,
    }
    return Recipe.model_validate(
        {
            "objective": "answers",
            "model": {"checkpoint": str(small / "omni")},
            "train": train,
            "optimizer": {"lr": 1e-3},
            "arguments": settings,
            "output": str(output),
        }
    )


def mixture(folder: Path) -> dict[str, Any]:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in range(5)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet = {"data": {"path": str(folder / "shards")}, "weight": 3.0}
    return {"sources": [parquet, {"data": {"path": str(folder / "chats.jsonl")}}]}


@pytest.mark.parametrize(("kind", "workers"), [("parquet", 2), ("mixture", 0)])
def test_a_run_that_is_resumed_ends_where_one_ends_that_was_left_alone(
    kind: str, workers: int, small: Path, tmp_path: Path
) -> None:
    """Stopped in the second epoch, whose order is another one than the first's."""
    shards(tmp_path / "shards", 12)
    data = {"path": str(tmp_path / "shards")} if kind == "parquet" else mixture(tmp_path)
    settings, out = recipe(small, data, tmp_path / "out", dataloader_num_workers=workers), tmp_path / "out"
    run(settings)
    expected, history = load_file(out / "model.safetensors"), (out / "run" / "history.json").read_text()
    for path in out.iterdir():  # as if it had been killed after the eighth step
        if path.name != "run":
            path.unlink()
    for checkpoint in (out / "run").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-8":
            shutil.rmtree(checkpoint)
    run(settings, resume=True)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [
        [entry["loss"] for entry in json.loads(text) if "loss" in entry]
        for text in (history, (out / "run" / "history.json").read_text())
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 10


def test_a_mixture_is_of_several_and_not_for_every_use(small: Path, tmp_path: Path) -> None:
    one = {"sources": [{"data": {"path": "a.jsonl"}}]}
    for change, words in (
        ({"train": one}, "at least 2"),
        ({"evaluate": {"sources": one["sources"] * 2}}, "`evaluate` is about one source"),
        ({"train": {"sources": [{"data": {"path": "a"}, "weight": 0}, {"data": {"path": "b"}}]}}, "greater than 0"),
    ):
        with pytest.raises((ValueError, RecipeError), match=words):
            settings = recipe(small, {"path": "a.jsonl"}, tmp_path / "out").model_dump()
            Recipe.model_validate({**settings, **change})


def test_a_run_on_other_rows_is_not_resumed(small: Path, tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    data = {"path": str(tmp_path / "shards")}
    run(recipe(small, data, tmp_path / "out"))
    (tmp_path / "shards" / "1.parquet").unlink()
    with pytest.raises(RecipeError, match="The files of `train` in the recipe have changed"):
        run(recipe(small, data, tmp_path / "out"), resume=True)

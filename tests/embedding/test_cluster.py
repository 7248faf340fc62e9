"""A cluster writes the table that one process writes, also when a machine dies in the middle of it."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from omni.embedding import RayError, describe, embed
from omni.embedding.engine import bfloat16_pays

Make = Callable[..., Path]
ENCODER = Path(__file__).resolve().parents[2] / "checkpoints" / "vision_tiny"

QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 5}
"""Ray notices within seconds that a machine is gone."""


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that does no work; machines are processes of this one."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICK})
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_two_machines_of_which_one_dies_write_what_one_process_writes(
    cluster: Any, save_encoder: Make, make_pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.chdir(tmp_path)
    encoder, _ = save_encoder(), make_pictures(150)
    Path("pictures/0/text.png").write_text("hello")
    large = Image.effect_noise((1200, 1200), 60).convert("RGB")  # so that both machines are at work all the time
    large.save("pictures/000.jpg")
    for number in range(1, 250):
        os.link("pictures/000.jpg", f"pictures/{number:03}.jpg")
    machines = [cluster.add_node(num_cpus=1, object_store_memory=300_000_000) for _ in range(2)]
    cluster.wait_for_nodes()
    killed = []

    def kill(done: int, total: int) -> None:
        if done > 100 and not killed:
            cluster.remove_node(machines[0], allow_graceful=False)
            killed.append(done)

    settings: dict[str, Any] = {"batch_size": 8, "shard_rows": 8}
    report = embed(["pictures"], encoder, "cluster", runner="ray", address=cluster.address, progress=kill, **settings)
    assert not ray.is_initialized()
    assert (report.rows, report.unreadable, report.computed) == (401, 1, 401)
    assert killed
    assert killed[0] < 300
    embed(["pictures"], encoder, "local", **settings)
    found, expected = (pq.read_table(name) for name in ("cluster", "local"))
    assert found.drop_columns("embedding").equals(expected.drop_columns("embedding"))
    assert found.schema.equals(expected.schema, check_metadata=True)
    for one, other in zip(found["embedding"].to_pylist(), expected["embedding"].to_pylist(), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert found.equals(expected), "equal, but not to the last bit"


@pytest.mark.long
def test_a_machine_that_computes_something_else_ends_the_job(
    cluster: Any,
    make_pictures: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    another_form: Callable[..., None],
) -> None:
    encoder, pictures, output = ENCODER, make_pictures(10), tmp_path / "out.parquet"
    cluster.add_node(num_cpus=1, object_store_memory=300_000_000)
    cluster.wait_for_nodes()

    def start() -> None:
        embed([pictures], encoder, output, precision="bfloat16", runner="ray", address=cluster.address, resume=True)

    with monkeypatch.context() as patch:  # in this process alone
        another_form(patch)
        with pytest.raises(
            RayError,
            match=r"The machine '.*' cannot compute the same as this one: expected the encoder 'doubled', found '",
        ):
            start()
    assert not list(tmp_path.glob("out.parquet.parts/*.parquet"))
    pays = bfloat16_pays()
    monkeypatch.setattr("omni.embedding.engine.bfloat16_pays", lambda: not pays)  # what is faster here, there is not
    start()
    assert describe(output)["dtype"] == ("float32" if pays else "bfloat16")
    embed([pictures], encoder, tmp_path / "local.parquet", precision="bfloat16")
    found, expected = (pq.read_table(tmp_path / name) for name in ("out.parquet", "local.parquet"))
    assert found.equals(expected)


def test_without_ray_it_is_said_how_to_get_it(
    save_encoder: Make, make_pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayError, match=r'needs Ray, .*; pip install "omni-thinker\[scale\]"') as caught:
        embed([make_pictures(2)], save_encoder(), tmp_path / "out.parquet", runner="ray")
    assert str(caught.value).count("\n") == 0

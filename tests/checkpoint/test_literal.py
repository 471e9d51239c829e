"""Names with patterns in them: what Orbax writes there it reads back, and nothing of its neighbours."""

import os

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from chroma_jax.checkpoint.literal import literal

NAMES = ["run[1]", "run*", "run?", "run**", "[", "a b#%20é"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_read_back(tmp_path, name):
    tree = {"a": np.arange(3), "b": {"c": np.ones((2, 2), np.float32)}}
    path = literal(tmp_path / name / "params")
    (tmp_path / name).mkdir()
    ocp.save(path, tree)
    assert set(ocp.metadata(path).metadata) == {"a", "b"}
    got = ocp.load(path)
    np.testing.assert_array_equal(got["a"], tree["a"])
    np.testing.assert_array_equal(got["b"]["c"], tree["b"]["c"])


def test_runs_under_such_a_name(tmp_path):
    with ocp.training.Checkpointer(literal(tmp_path / "run[1]*")) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"a": np.full(3, step)}, force=True)
    with ocp.training.Checkpointer(literal(tmp_path / "run[1]*")) as checkpointer:
        assert [found.step for found in checkpointer.checkpoints] == [1, 2]
        np.testing.assert_array_equal(checkpointer.load(2)["a"], [2, 2, 2])


def test_a_pattern_matches_below_the_directory_alone(tmp_path):
    for name in ("run*", "run1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"part_{name[-1]}").touch()
    assert [os.path.basename(found) for found in literal(tmp_path / "run*").glob("part_*")] == [
        "part_*"
    ]
    assert list(literal(tmp_path / "absent").glob("*")) == []


def test_object_stores_stay(monkeypatch):
    assert literal("gs://bucket/run[1]").as_uri().startswith("gs://")

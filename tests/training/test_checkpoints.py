"""Checkpoints of a run: what is kept, what comes back, and what is refused."""

import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chroma_jax.training.checkpoints import (
    Checkpoints,
    Position,
    abstract,
    base_fingerprint,
    changes,
    few,
    structure,
)
from chroma_jax.training.step import TrainState


def state(scale=1.0, width=3):
    params = {"backbone": {"head": jnp.arange(4.0 * width).reshape(4, width) * scale}}
    moments = ({"count": jnp.int32(7), "mu": jax.tree.map(lambda x: x + 1, params)}, ())
    return TrainState(jnp.int32(5), params, moments, {})


def position(step):
    return Position(step, {"position": step, "plan": "abc"}, {"steps": 9, "train": {"seed": 1}})


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype


def test_the_newest_comes_back_and_old_ones_go(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as saved:
        assert saved.steps == [] and saved.restore(abstract(state())) is None
        for step in (1, 2, 10):
            saved.save(state(step), position(step))
        saved.wait()
        assert saved.steps == [2, 10]
    with Checkpoints(tmp_path / "c", keep=2) as saved:
        got, where = saved.restore(abstract(state()))
    assert_same(got, state(10))
    assert where == position(10)


def test_a_save_is_not_disturbed_by_the_next_step(tmp_path):
    """The state is donated to the step that follows, while it is still being written."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    big = TrainState(jnp.int32(1), {"w": jnp.ones((1000, 1000))}, (), {})
    with Checkpoints(tmp_path / "c", keep=1) as saved:
        saved.save(big, position(1))
        jax.block_until_ready(step(big))
        saved.wait()
        got, _ = saved.restore(
            abstract(TrainState(jnp.int32(1), {"w": jnp.ones((1000, 1000))}, (), {}))
        )
    assert float(got.params["w"].min()) == 1 and int(got.step) == 1


def test_restored_into_another_sharding(tmp_path):
    devices = np.array(jax.devices()[:4])
    mesh = jax.sharding.Mesh(devices, ("fsdp",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    with Checkpoints(tmp_path / "c", keep=1) as saved:
        saved.save(state(), position(1))
        saved.wait()
        like = abstract(state())
        head = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=where)
        like = like._replace(params={"backbone": {"head": head}})
        got, _ = saved.restore(like)
    assert got.params["backbone"]["head"].sharding == where
    assert_same(got, state())


def test_another_shape_is_refused(tmp_path):
    with Checkpoints(tmp_path / "c", keep=1) as saved:
        saved.save(state(), position(1))
        saved.wait()
        with pytest.raises(ValueError, match="another model, stage or LoRA rank"):
            saved.restore(abstract(state(width=5)))
        assert saved.steps == [1]
    assert structure(state()) == structure(abstract(state(2.0))) != structure(state(width=5))


def test_a_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c", keep=1) as saved:
        saved.save(state(), position(1))
        saved.wait()
        full = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(OSError, match="not enough space in .* for the checkpoint of step 2"):
            saved.save(state(), position(2))
        assert saved.steps == [1]


class Failed:
    """The answer of a save that could not be written."""

    def result(self):
        raise RuntimeError("Failed writing: x: No space left on device [os_error]\nlong story")


def test_a_write_that_fails_is_told(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c", keep=1) as saved:
        monkeypatch.setattr(saved._checkpointer, "save_async", lambda *_, **__: Failed())
        saved.save(state(), position(1))
        with pytest.raises(OSError, match="could not be written to .*: No space left on device$"):
            saved.wait()
        saved.wait()  # it is told once


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
@pytest.mark.parametrize("saves", [8, pytest.param(2000, marks=pytest.mark.slow)])
def test_saves_hold_nothing_on_to(tmp_path, saves):
    with Checkpoints(tmp_path / "c", keep=1) as saved:
        for step in range(saves):
            saved.save(state(), position(step))
            if step == 3:
                saved.wait()
                before, memory = held(), resident()
        saved.wait()
        assert held() == before
        assert resident() - memory < 100 * 2**20


def resident() -> int:
    """Bytes of memory."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_half_written_ones_are_not_seen(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as saved:
        saved.save(state(), position(1))
        saved.wait()
    half = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "c" / "1", half)
    with Checkpoints(tmp_path / "c", keep=2) as saved:
        assert saved.steps == [1]
        assert saved.restore(abstract(state()))[1].step == 1


def test_reading_what_another_process_replaces(tmp_path, monkeypatch):
    with (
        Checkpoints(tmp_path / "c", keep=1) as saved,
        Checkpoints(tmp_path / "c", keep=1, reading=True) as reading,
    ):
        assert reading.steps == []
        saved.save(state(1), position(1))
        saved.wait()
        reading._checkpointer.reload()
        load, replaced = reading._checkpointer.load, []

        def late(step, like):
            if not replaced:
                replaced.append(step)
                saved.save(state(2), position(2))  # which removes the first
                saved.wait()
            return load(step, like)

        monkeypatch.setattr(reading._checkpointer, "load", late)
        got, where = reading.restore(abstract(state()))
    assert replaced == [1] and where == position(2)
    assert_same(got, state(2))


def test_a_damaged_one_is_left_alone_by_who_only_reads(tmp_path, caplog):
    with Checkpoints(tmp_path / "c", keep=2) as saved:
        for step in (1, 2):
            saved.save(state(step), position(step))
    file = max((tmp_path / "c/2").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    os.truncate(file, 7)
    with Checkpoints(tmp_path / "c", keep=2, reading=True) as reading:
        assert reading.restore(abstract(state()))[1] == position(1)
    assert "step 2 is damaged, reading the one before it" in caplog.text
    assert sorted(os.listdir(tmp_path / "c")) == ["1", "2"] and os.listdir(tmp_path) == ["c"]


def test_a_fingerprint_of_the_base():
    w = jax.random.normal(jax.random.key(0), (6, 4, 5))
    tree = {"a": {"w": w}, "b": w.astype(jnp.bfloat16), "c": (w * 50).astype(jnp.int8)}
    prints = {base_fingerprint(tree)}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    prints.add(base_fingerprint(jax.device_put(tree, where)))
    assert len(prints) == 1
    one, two = w[1, 2, 3], w[5, 0, 1]
    prints |= {
        base_fingerprint(tree | {"a": {"w": w.at[1, 2, 3].set(jnp.nextafter(one, 9.0))}}),
        base_fingerprint(tree | {"a": {"w": w.at[1, 2, 3].set(two).at[5, 0, 1].set(one)}}),
        base_fingerprint(tree | {"a": {"w": w.swapaxes(0, 2)}}),
        base_fingerprint(tree | {"b": tree["c"], "c": tree["b"]}),
        base_fingerprint({"a": {"w": w}, "b": tree["b"]}),
    }
    assert len(prints) == 6


def test_changes():
    before = {"a": 1, "b": {"c": 2, "d": 3}}
    after = {"a": 1, "b": {"c": 5, "d": 3}, "e": "x"}
    assert changes(before, after) == ["b.c: 2 -> 5", "e: None -> 'x'"]
    assert changes(before, before) == []


def test_few():
    assert few(["a: 1 -> 2"]) == "a: 1 -> 2"
    told = few(["x" * 100, "b", "c", "d"])
    assert told == f"{'x' * 57}...; b; 2 more" and few([]) == ""

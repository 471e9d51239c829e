"""A run of six steps, as small as a run can be, and how to look at what it left."""

import copy
import os
import shutil

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from chroma_jax.training import loop, selection
from chroma_jax.training.run_config import RunConfig

STEPS = 6


def values(dataset, checkpoint, **changes) -> dict:
    """A configuration as a file would hold it; `a__b` changes key b of a."""
    out = dict(
        model=dict(checkpoint=str(checkpoint), size="tiny"),
        data=dict(train=str(dataset), evaluation=str(dataset), batch_size=2, num_shapes=1, threads=1, prefetch=1),
        train=dict(
            optimizer=dict(
                learning_rate=5e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0, schedule="constant",
                warmup_steps=2, total_steps=STEPS,
            ),
            trains=selection.STAGE_1, decoder_weight=0.5, compute_dtype="float32", reasoner_dtype="float32",
        ),
        steps=STEPS, save_every=3, eval_every=6, log_every=2, keep=2,
        sample_every=0, num_samples=2, sample_seconds=0.8,
    )  # fmt: skip
    for key, value in changes.items():
        node = out
        *parents, name = key.split("__")
        for parent in parents:
            node = node[parent]
        node[name] = value
    return copy.deepcopy(out)


def run(dataset, checkpoint, workdir, *, export="never", say=None, **changes):
    """(outcome, lines that it said)."""
    lines = []

    def hear(line):
        lines.append(line)
        if say is not None:
            say(line)

    config = RunConfig.from_dict(values(dataset, checkpoint, **changes))
    return loop.train(config, workdir, export=export, say=hear), lines


def saved_steps(workdir) -> list[int]:
    """Of checkpoints that are whole."""
    return sorted(int(name) for name in os.listdir(workdir / loop.CHECKPOINTS) if name.isdigit())


def state(workdir, step: int) -> dict[str, np.ndarray]:
    """Everything in a checkpoint, by path."""
    with ocp.training.Checkpointer(workdir / loop.CHECKPOINTS) as saved:
        tree = saved.load(step)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        return found | {"data": saved.metadata(step).custom_metadata["data"]}


def assert_same_bits(got, want):
    """Parameters, moments, step and position of the data."""
    assert got.keys() == want.keys() and len(want) > 70
    for path, array in want.items():
        if path == "data":
            assert got[path] == array
        else:
            np.testing.assert_array_equal(got[path], array, err_msg=path)


def largest_file(folder):
    """The one with the parameters."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def clone(workdir, to):
    """A copy to do damage to."""
    shutil.copytree(workdir, to)
    return to

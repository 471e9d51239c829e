"""The plan of batches: every record once, proportions, few shapes, the same for every process and moment."""

import itertools

import numpy as np
import pytest

from chroma_jax.audio.batch import bucket_sizes
from chroma_jax.data.plan import (
    Limits,
    Plan,
    Shape,
    choose_shapes,
    in_order,
    into_batches,
    round_up,
    shuffle,
    smallest_shapes,
)
from chroma_jax.data.voices import VoiceDraw

SIZES = np.random.default_rng(0).integers(1, 300, (500, 4))


def plan(sources, weights, level, batch_size=4, seed=0):
    return Plan(sources, weights, level, int(level.max()) + 1, batch_size=batch_size, seed=seed)


def epoch(p, number):
    return [p[i] for i in range(number * p.batches, (number + 1) * p.batches)]


@pytest.mark.parametrize(
    ("count", "batch_size"), [(40, 4), (43, 4), (9, 8), (5, 1)], ids=lambda n: str(n)
)
def test_an_epoch_has_each_record_at_most_once(count, batch_size):
    level = np.random.default_rng(1).integers(0, 3, count)
    p = plan([np.arange(count)], [1.0], level, batch_size)
    orders, left_out = set(), set()
    for number in range(6):
        batches = epoch(p, number)
        rows = np.concatenate([b.records for b in batches])
        assert len(batches) == count // batch_size
        assert len(set(rows.tolist())) == len(rows) == len(batches) * batch_size
        assert all(b.epoch == number for b in batches)
        # Every record fits the shape that its batch has.
        assert all((level[b.records] <= b.shape).all() for b in batches)
        # No more than one batch per shape is shared by records of smaller ones.
        assert sum((level[b.records] != b.shape).any() for b in batches) <= 2
        orders.add(rows.tobytes())
        left_out |= set(range(count)) - set(rows.tolist())
    assert len(orders) == 6
    if count % batch_size:
        assert len(left_out) > count % batch_size  # not always the same ones


def test_any_batch_at_any_time():
    level = np.random.default_rng(1).integers(0, 3, 50)
    p, q = (plan([np.arange(50)], [1.0], level, seed=5) for _ in range(2))
    want = [p[i] for i in range(60)]
    for i in np.random.default_rng(2).permutation(60):
        got = q[int(i)]
        assert (got.epoch, got.shape) == (want[i].epoch, want[i].shape)
        np.testing.assert_array_equal(got.records, want[i].records)
    other = plan([np.arange(50)], [1.0], level, seed=6)
    assert not all(np.array_equal(other[i].records, want[i].records) for i in range(12))


def test_mixtures_keep_their_proportions():
    sources = [np.arange(10), np.arange(10, 200), np.arange(200, 207)]
    weights = [3.0, 1.0, 2.0]
    level = np.random.default_rng(1).integers(0, 3, 207)
    p = plan(sources, weights, level, batch_size=9)
    rows = [np.concatenate([b.records for b in epoch(p, e)]) for e in range(30)]
    assert {len(r) for r in rows} == {207}
    counts = np.array([[np.isin(r, s).sum() for s in sources] for r in rows])
    share = np.array(weights) / 6
    # Whole numbers in each epoch, exact in the long run.
    assert (np.abs(counts - 207 * share) <= 1).all()
    assert (np.abs(counts.sum(axis=0) - 30 * 207 * share) <= 1).all()
    # Within a source, passes: no record twice as often as another.
    everything = np.concatenate(rows)
    for source in sources:
        times = np.bincount(everything, minlength=207)[source]
        assert times.max() - times.min() <= 1
    # And mixed, not one source after the other.
    first = np.concatenate([b.records for b in epoch(p, 0)[:8]])
    assert all(np.isin(first, s).any() for s in sources)


def test_plans_that_cannot_be():
    level = np.zeros(10, int)
    with pytest.raises(ValueError, match="10 records are fewer than a batch of 11"):
        plan([np.arange(10)], [1.0], level, batch_size=11)
    with pytest.raises(ValueError, match="source 1 has no records"):
        plan([np.arange(10), np.arange(0)], [1.0, 1.0], level)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight of source 0"):
            plan([np.arange(10)], [weight], level)


def test_shapes_are_few_nested_and_of_the_known_sizes():
    shapes = choose_shapes(SIZES, (40, 90), 4)
    assert 2 <= len(shapes) <= 4
    assert all(b.holds(a) for a, b in itertools.pairwise(shapes))
    level = smallest_shapes(SIZES, shapes)
    for row, n in zip(SIZES, level, strict=True):
        assert all(row <= shapes[n][:4])
        assert n == 0 or not all(row <= shapes[n - 1][:4])
    for shape in shapes:
        for n, first in zip(shape, (64, 1, 16, 32, 32, 32), strict=True):
            assert n in bucket_sizes(first, 4096)
        assert shape[4:] == (64, 96)
    assert (np.bincount(level) > 0).all()
    assert round_up(Shape(65, 3, 16, 100, 1, 33)) == (128, 3, 16, 128, 32, 64)


def padded(shapes, lengths):
    """Positions that are computed, over positions that hold something."""
    level = smallest_shapes(lengths, shapes)
    return np.array([s[:4] for s in shapes])[level].sum(axis=0) / lengths.sum(axis=0)


@pytest.mark.parametrize("kind", ["answers_vary", "questions_vary", "all_alike"])
def test_shapes_follow_what_varies(kind):
    rng = np.random.default_rng(0)
    frames = np.exp(rng.normal(5, 0.7, 3000)).astype(int) + 1
    prompt = np.exp(rng.normal(5, 0.7, 3000)).astype(int) + 1
    if kind == "answers_vary":
        prompt[:] = 100
    if kind == "questions_vary":
        frames[:] = 100
    if kind == "all_alike":
        prompt = 2 * frames
    lengths = np.stack([prompt, prompt // 50 + 1, frames // 5 + 1, frames], axis=1)
    few, one = choose_shapes(lengths, (40, 90), 4), choose_shapes(lengths, (40, 90), 1)
    assert len(few) == 4
    assert len(one) == 1
    column = 0 if kind == "questions_vary" else 3
    assert padded(few, lengths)[column] < 0.35 * padded(one, lengths)[column]


def test_shapes_that_do_not_do():
    small, large = Shape(64, 1, 16, 32, 32, 32), Shape(128, 1, 16, 32, 32, 32)
    with pytest.raises(ValueError, match="shapes must grow"):
        smallest_shapes(SIZES, (large, small))
    with pytest.raises(ValueError, match="does not fit the largest shape"):
        smallest_shapes(np.array([[100, 1, 17, 3]]), (small, large))


def test_left_over_rows_move_to_larger_shapes():
    records, level = np.arange(11), np.array([0, 1, 0, 2, 0, 1, 0, 0, 1, 2, 0])
    batches, shapes = into_batches(records, level, 3, 3)
    assert batches.tolist() == [[0, 2, 4], [6, 7, 10], [1, 5, 8]]
    assert shapes.tolist() == [0, 0, 1]
    batches, shapes = into_batches(records, level, 3, 4)
    assert batches.tolist() == [[0, 2, 4, 6], [7, 10, 1, 5]]
    assert shapes.tolist() == [0, 1]


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_in_order_has_every_record_once(count):
    level = np.random.default_rng(3).integers(0, 3, 20)
    records = np.arange(5, 5 + count)
    batches = in_order(level, records, 3, 4)
    rows = np.concatenate([b.records for b in batches])
    assert len(batches) == -(-count // 4)
    assert sorted(rows[rows >= 0].tolist()) == records.tolist()
    assert (batches[-1].records[: len(rows) - count or None] >= 0).any()
    assert all((b.records >= 0).all() for b in batches[:-1])
    assert all((level[b.records[b.records >= 0]] <= b.shape).all() for b in batches)


def test_shuffles_are_the_same_everywhere():
    # Fixed numbers: training that goes on elsewhere, with another numpy, sees the same order.
    assert shuffle(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]
    assert sorted(shuffle(100, 5).tolist()) == list(range(100))


def test_limits():
    lengths = {name: SIZES[:, i] for i, name in enumerate(("prompt", "chunks", "text", "frames"))}
    beyond = Limits(max_text=200, max_frames=250).too_long(lengths)
    assert set(beyond) == {"text", "frames"}
    np.testing.assert_array_equal(beyond["frames"], SIZES[:, 3] > 250)
    with pytest.raises(ValueError, match="on_long"):
        Limits(on_long="cut")


def test_voices_are_other_utterances_of_the_speaker():
    rng = np.random.default_rng(0)
    speaker = rng.integers(-1, 12, 200)
    speaker[7] = 12  # alone
    utterance = rng.integers(0, 60, 200)  # some answers occur twice
    usable = rng.random(200) < 0.9
    draw = VoiceDraw(speaker, utterance, usable)
    seen = {}
    for index in range(200):
        others = (speaker == speaker[index]) & (utterance != utterance[index]) & usable
        for e in range(40):
            got = draw(index, 3, e)
            assert got == draw(index, 3, e)
            if speaker[index] < 0 or not others.any():
                assert got is None
            else:
                assert others[got]
                seen.setdefault(index, set()).add(got)
    assert draw(7, 0, 0) is None
    # Every candidate has its turn: 40 draws of about 14.
    assert np.mean([len(s) for s in seen.values()]) > 10
    assert any(draw(0, 4, e) != draw(0, 3, e) for e in range(20))

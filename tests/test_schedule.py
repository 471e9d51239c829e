"""The layout against a plain reading of the rule, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chroma_jax import schedule
from chroma_jax.schedule import Kind

CASES = {
    "text_and_frames": (3, 4, 5, 10),
    "text_ends_early": (2, 1, 2, 9),
    "no_text_yet": (4, 3, 0, 0),
    "odd_frames": (1, 6, 3, 5),
    "one_frame": (5, 2, 1, 1),
}


def spelled_out(voice_ids, voice_frames, text, frames):
    """The sequence as a list of (kind, index), and the position that predicts each frame."""
    out = [(Kind.TEXT_START, 0)]
    out += [(Kind.VOICE_TEXT, i) for i in range(voice_ids)]
    out += [(Kind.TEXT_END, 0)]
    out += [(Kind.VOICE_FRAME, i) for i in range(voice_frames)]
    out += [(Kind.ZERO, 0)]
    predicts, frame = [], 0
    for i in range(text):
        out += [(Kind.HIDDEN, i), (Kind.TEXT, i)]
        for _ in range(2):
            predicts.append(len(out) - 1)
            if frame < frames:
                out.append((Kind.FRAME, frame))
                frame += 1
    while frame < frames:
        predicts.append(len(out) - 1)
        out.append((Kind.FRAME, frame))
        frame += 1
    return out, predicts[:frames]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layout_and_predictors(case):
    want, predicts = spelled_out(*case)
    assert schedule.total_length(*case) == len(want)
    size = len(want) + 3
    lengths = [jnp.asarray([n]) for n in case]
    got = jax.jit(schedule.layout, static_argnums=4)(*lengths, size)
    pairs = list(
        zip(np.asarray(got.kind[0]).tolist(), np.asarray(got.index[0]).tolist(), strict=True)
    )
    assert pairs[: len(want)] == [(int(k), i) for k, i in want]
    assert all(kind == Kind.PAD for kind, _ in pairs[len(want) :])
    positions = schedule.predictors(*lengths[:3], case[3])
    np.testing.assert_array_equal(positions[0], predicts)


def test_rows_are_laid_out_independently():
    rows = list(CASES.values())
    batch = schedule.layout(*(jnp.asarray(column) for column in zip(*rows, strict=True)), 40)
    for b, row in enumerate(rows):
        alone = schedule.layout(*(jnp.asarray([n]) for n in row), 40)
        np.testing.assert_array_equal(batch.kind[b], alone.kind[0])
        np.testing.assert_array_equal(batch.index[b], alone.index[0])


def test_a_beat_is_four_positions_of_the_layout():
    voice_ids, voice_frames, text, frames = 3, 2, 4, 8
    want, predicts = spelled_out(voice_ids, voice_frames, text, frames)
    start = schedule.voice_length(voice_ids, voice_frames)
    for i in range(text):
        span = want[start + 4 * i : start + 4 * (i + 1)]
        previous = (Kind.ZERO, 0) if i == 0 else (Kind.FRAME, 2 * i - 1)
        assert span == [previous, (Kind.HIDDEN, i), (Kind.TEXT, i), (Kind.FRAME, 2 * i)]
        count, read = schedule.beat_extent(jnp.asarray([True]))
        assert int(count[0]) == 3
        assert predicts[2 * i] == start + 4 * i + int(read[0])

import math

import jax.numpy as jnp
import numpy as np
import pytest

from chroma_jax.config import Llama3Rope, RopeConfig
from chroma_jax.model.rope import apply_rotary, inverse_frequencies, rotary_angles

STRETCHES = {
    "Llama 3.1": Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    ),
    "Backbone": Llama3Rope(
        factor=32.0, low_freq_factor=0.125, high_freq_factor=0.5, original_max_positions=1024
    ),
    "Decoder": Llama3Rope(
        factor=32.0,
        low_freq_factor=0.001953125,
        high_freq_factor=0.0078125,
        original_max_positions=16,
    ),
}
PLAIN = RopeConfig(theta=5e5)


def test_plain_frequencies():
    np.testing.assert_allclose(
        inverse_frequencies(RopeConfig(theta=10000.0), 8), [1.0, 0.1, 0.01, 0.001], rtol=1e-6
    )


@pytest.mark.parametrize("stretch", STRETCHES.values(), ids=STRETCHES.keys())
def test_stretched_frequencies(stretch):
    """Short waves stay, long ones are stretched whole, those between by a weighted mean of the two frequencies."""
    plain = inverse_frequencies(PLAIN, 128).astype(float)
    got = inverse_frequencies(RopeConfig(theta=5e5, llama3=stretch), 128)
    waves_in_context = stretch.original_max_positions * plain / (2 * math.pi)
    bands = set()
    for frequency, result, waves in zip(plain, got, waves_in_context, strict=True):
        if waves > stretch.high_freq_factor:
            bands.add("kept")
            want = frequency
        elif waves < stretch.low_freq_factor:
            bands.add("stretched")
            want = frequency / stretch.factor
        else:
            bands.add("blended")
            span = stretch.high_freq_factor - stretch.low_freq_factor
            kept = (waves - stretch.low_freq_factor) / span
            want = frequency * (kept + (1 - kept) / stretch.factor)
        np.testing.assert_allclose(result, want, rtol=1e-5)
    assert bands == {"kept", "stretched", "blended"}
    assert (np.diff(got) < 0).all()


def test_rotation_of_a_pair():
    """Dimension h turns with h + H/2, counterclockwise, by position times frequency."""
    cos, sin = rotary_angles(RopeConfig(theta=16.0), 4, jnp.array([[3]]))
    x = np.zeros((1, 1, 2, 4), np.float32)
    x[0, 0, 0, 0] = x[0, 0, 1, 3] = 1
    a, b = 3.0, 3.0 / 4.0  # frequencies 1 and 16 ** -0.5
    want = [[math.cos(a), 0, math.sin(a), 0], [0, -math.sin(b), 0, math.cos(b)]]
    np.testing.assert_allclose(apply_rotary(x, cos, sin)[0, 0], want, atol=1e-6)


@pytest.mark.parametrize("stretch", [None, STRETCHES["Decoder"]], ids=["plain", "llama3"])
def test_only_distance_matters(stretch):
    rope = RopeConfig(theta=100.0, llama3=stretch)
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 16), np.float32)

    def score(m, n):
        q_turned = apply_rotary(q, *rotary_angles(rope, 16, jnp.array([[m]])))
        return np.vdot(q_turned, apply_rotary(k, *rotary_angles(rope, 16, jnp.array([[n]]))))

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
    np.testing.assert_allclose(score(0, 0), np.vdot(q, k), rtol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_equal_components_are_plain():
    positions = np.random.default_rng(0).integers(0, 500, (2, 7))
    plain = rotary_angles(PLAIN, 16, positions)
    three = rotary_angles(RopeConfig(theta=5e5, sections=(2, 3, 3)), 16, np.stack([positions] * 3))
    np.testing.assert_array_equal(three, plain)
    one = rotary_angles(RopeConfig(theta=5e5, sections=(2, 3, 3)), 16, positions)
    np.testing.assert_array_equal(one, plain)


def test_sections_follow_their_components():
    """Time, height, width: the first, next and last of the frequencies."""
    positions = np.random.default_rng(0).integers(0, 500, (3, 2, 7))
    got = rotary_angles(RopeConfig(theta=5e5, sections=(1, 5, 2)), 16, positions)
    bounds = [slice(0, 1), slice(1, 6), slice(6, 8)]
    for component, part in zip(positions, bounds, strict=True):
        for table, plain in zip(got, rotary_angles(PLAIN, 16, component), strict=True):
            np.testing.assert_array_equal(table[..., part], plain[..., part])


def test_three_components_need_sections():
    with pytest.raises(ValueError, match="mrope_section"):
        rotary_angles(PLAIN, 16, jnp.zeros((3, 1, 4), int))


def test_bfloat16_is_rotated_in_float32():
    """Positions in bfloat16 would be off by whole turns: 1001 has no place there."""
    x = np.random.default_rng(0).standard_normal((1, 1, 2, 16), np.float32)
    cos, sin = rotary_angles(PLAIN, 16, jnp.array([[1001]]))
    x16 = jnp.asarray(x, jnp.bfloat16)
    got = apply_rotary(x16, cos, sin)
    assert got.dtype == jnp.bfloat16 and cos.dtype == jnp.float32
    want = apply_rotary(x16.astype(jnp.float32), cos, sin).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, want)

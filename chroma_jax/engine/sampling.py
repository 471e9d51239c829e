"""Choosing tokens and codes: greedy, temperature, top-k, top-p, min-p, repetition penalty, for three stages at once.

Controls are per row and are arrays inside jit, so requests with different settings share one batch and one compilation. The
order and the meaning of the controls are those of transformers' logits processors: penalty, temperature, top-k, top-p, min-p.

Axes: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What float32 can tell from infinity and from nothing.
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """How one kind of token is chosen.

    Attributes:
      temperature: divides the logits; 0 chooses greedily (after the repetition penalty).
      top_k: keeps the k likeliest; 0 keeps all.
      top_p: keeps the smallest set of likeliest tokens with at least this probability; 1 keeps all.
      min_p: keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens already in this reply (per codebook); 1 is off.

    Raises:
      ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            # What is beyond float32 would be infinite, or nothing, on the device.
            if not number or not abs(value) <= _LARGEST:
                raise ValueError(f"{name} must be a finite number, got {value!r:.60}")
        if self.temperature < 0:
            raise ValueError(
                f"temperature must be at least 0 (0 is greedy), got {self.temperature}"
            )
        whole = isinstance(self.top_k, int | np.integer) and not isinstance(self.top_k, bool)
        if not whole or not 0 <= self.top_k < 2**31:
            raise ValueError(
                f"top_k must be a whole number from 0 (off) to 2**31 - 1, got {self.top_k!r:.60}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if not self.repetition_penalty >= _SMALLEST:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")


@dataclasses.dataclass(frozen=True)
class Sampling(TokenSampling):
    """How a reply is chosen. The plain controls are those of speech: code 0 and codes 1..Q-1; text is greedy.

    Attributes:
      text: the Reasoner's text tokens; default greedy, as in the reference.
      code0: overrides the plain controls for code 0 (the Backbone: what is said, and how).
      codes: overrides them for codes 1..Q-1 (the Decoder: acoustic detail).

    Raises:
      ValueError: a value out of range or of another kind.
    """

    text: TokenSampling = TokenSampling()
    code0: TokenSampling | None = None
    codes: TokenSampling | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("text", "code0", "codes"):
            value = getattr(self, name)
            if not isinstance(value, TokenSampling) and (value is not None or name == "text"):
                raise ValueError(f"{name} must be a TokenSampling, got {value!r:.60}")

    @classmethod
    def greedy(cls) -> Sampling:
        """The likeliest of everything: reproducible without a seed."""
        return cls()

    def stages(self) -> tuple[TokenSampling, TokenSampling, TokenSampling]:
        """Controls of text, code 0 and codes 1..Q-1."""
        plain = TokenSampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        )
        return self.text, self.code0 or plain, self.codes or plain


class Controls(NamedTuple):
    """`TokenSampling` of every row, as arrays."""

    temperature: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32
    top_p: jax.Array  # [B] float32
    min_p: jax.Array  # [B] float32
    repetition_penalty: jax.Array  # [B] float32


class StageControls(NamedTuple):
    """`Sampling` of every row, as arrays; None for a stage that is plainly greedy in all rows, which compiles to an argmax."""

    text: Controls | None
    code0: Controls | None
    codes: Controls | None


def controls(samplings: Sequence[Sampling], always: Collection[str] = ()) -> StageControls:
    """Arrays for a batch from one `Sampling` per row.

    `always` names stages ("text", "code0", "codes") that get arrays even where all rows are plainly greedy: a batch whose rows
    come and go keeps one compilation.
    """

    def stack(stage: str, rows: Sequence[TokenSampling]) -> Controls | None:
        if stage not in always and all(map(is_plainly_greedy, rows)):
            return None

        def column(name: str, dtype: type) -> np.ndarray:
            return np.asarray([getattr(row, name) for row in rows], dtype)

        return Controls(
            column("temperature", np.float32),
            column("top_k", np.int32),
            column("top_p", np.float32),
            column("min_p", np.float32),
            column("repetition_penalty", np.float32),
        )

    columns = zip(*(s.stages() for s in samplings), strict=True)
    return StageControls(*map(stack, StageControls._fields, columns))


def check_sampling(sampling: object) -> Sampling:
    """The sampling of a request; None is greedy. Raises ValueError for anything else."""
    if sampling is None:
        return Sampling.greedy()
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling, got {sampling!r:.60}")
    return sampling


def is_plainly_greedy(sampling: TokenSampling) -> bool:
    """Whether the choice is the likeliest token, whatever has been said."""
    return sampling.temperature == 0 and sampling.repetition_penalty == 1


def choose(logits: jax.Array, c: Controls | None, keys: jax.Array, seen: jax.Array) -> jax.Array:
    """Picks one token per row.

    Args:
      logits: [B, V] float32.
      c: controls of each row; None for the likeliest token.
      keys: [B] typed PRNG keys; a row's choice depends on its own key alone.
      seen: [B, V] bool, tokens that the repetition penalty applies to.

    Returns:
      Token ids [B] int32.
    """
    if c is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    penalty = c.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    scaled = logits / jnp.maximum(c.temperature, 1e-6)[:, None]
    kept = jnp.where(scaled >= _threshold(scaled, c)[:, None], scaled, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    sampled = (c.temperature > 0)[:, None]
    return jnp.argmax(jnp.where(sampled, kept + noise, logits), axis=-1).astype(jnp.int32)


def _threshold(logits: jax.Array, c: Controls) -> jax.Array:
    """The smallest logit [B] that top-k, top-p and min-p together keep; equal logits are kept together."""
    vocab = logits.shape[1]
    ranked = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(vocab)
    top_k = jnp.where(c.top_k > 0, jnp.minimum(c.top_k, vocab), vocab)[:, None]
    ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    top_p = c.top_p[:, None]
    kept = (rank < top_k) & ((before < top_p) | (top_p >= 1))
    kept &= probability >= c.min_p[:, None] * probability[:, :1]
    kept |= rank == 0
    return jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1)

"""Arrays in, arrays out: a batch of prompts that begins together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chroma_jax.audio.batch import Inputs, normalize_inputs
from chroma_jax.engine import caches, programs
from chroma_jax.engine.batch import BEATS_PER_CALL, RunningBatch
from chroma_jax.engine.engine import Engine
from chroma_jax.engine.reply import Generated, collect
from chroma_jax.engine.request import check_choice
from chroma_jax.engine.sampling import Sampling
from chroma_jax.engine.state import Beat
from chroma_jax.engine.stream import Stream


def generate(
    engine: Engine,
    inputs: Inputs | Mapping[str, np.ndarray],
    *,
    max_frames: int,
    sampling: Sampling | Sequence[Sampling] | None = None,
    seed: int | Sequence[int] = 0,
    audio: bool = True,
) -> Generated:
    """`Chroma.generate`."""
    whole = isinstance(max_frames, int | np.integer) and not isinstance(max_frames, bool)
    if not whole or not 0 <= max_frames < 2**31:
        raise ValueError(f"max_frames must be a whole number, at least 0, got {max_frames!r:.60}")
    batch = normalize_inputs(engine.config, inputs)
    rows = len(batch.lengths)
    samplings, seeds = _per_row("sampling", sampling, rows), _per_row("seed", seed, rows)
    chosen = [check_choice(*choice) for choice in zip(samplings, seeds, strict=True)]
    prompt = programs.as_prompt(batch, *programs.encode_voices(engine.model, batch))
    ledger = caches.ledger_of(engine.config, prompt, int(max_frames), grow=engine.grow)
    samplings, seeds = zip(*chosen, strict=True)
    state = programs.begin(
        engine.flat, prompt, int(max_frames), samplings, seeds, sizes=ledger.sizes()
    )
    streams = [Stream(engine, max_frames=int(max_frames), text=False) for _ in range(rows)]
    outs: list[Beat] = []
    running = RunningBatch.begun(engine, state, ledger, streams, audio=audio, sink=outs.append)
    while running.busy:
        running.step(BEATS_PER_CALL)
        for stream in streams:
            stream.take()
            if stream.error is not None:
                raise stream.error
    return collect(engine.config, outs, audio)


def _per_row(name: str, value: Any, rows: int) -> list:
    """One value per row from one for all or one each. Raises ValueError when the counts differ."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        return [value] * rows
    if len(value) != rows:
        raise ValueError(f"{name} has {len(value)} entries for a batch of {rows}")
    return list(value)

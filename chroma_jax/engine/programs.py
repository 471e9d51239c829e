"""The programs that the device runs, jitted: one compilation per set of static shapes, shared by all models of a process.

Axes: B batch, T frames, F voice frames, P transcript tokens, Q codebooks, D width.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax import schedule
from chroma_jax.audio.batch import PromptBatch, bucket, bucket_sizes
from chroma_jax.config import ChromaConfig
from chroma_jax.engine import beat as beats
from chroma_jax.engine import caches
from chroma_jax.engine import state as states
from chroma_jax.engine.beat import BeatState, Prompt
from chroma_jax.engine.caches import CacheSizes
from chroma_jax.engine.sampling import Sampling, controls
from chroma_jax.engine.voice import EncodedVoice
from chroma_jax.model import kv_cache
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.flat import FlatModule, module_of
from chroma_jax.model.kv_cache import KVCache


def jitted(function: Callable, **options: Any) -> Callable:
    """jax.jit of a function of a model and other things; the model may be a `FlatModule`."""

    @functools.wraps(function)
    def opening(model, *args, **kwargs):
        return function(module_of(model), *args, **kwargs)

    return jax.jit(opening, **options)


def _extend(model, given, lengths, *piece):
    """`beat.extend` of questions whose caches lie apart and hold `lengths` [B]."""
    k, v = (jnp.concatenate([cache[i] for cache in given], axis=1) for i in (0, 1))
    hidden, cache = beats.extend(model, KVCache(k, v, lengths), *piece)

    def row(i: int) -> KVCache:
        one = slice(i, i + 1)
        return KVCache(cache.k[:, one], cache.v[:, one], cache.length[one])

    rows = range(len(given))
    return [hidden[i : i + 1] for i in rows], [row(i) for i in rows]


_SIZES = ("reasoner_size", "backbone_size", "forced_size")
# States and caches that are replaced are donated.
prefill = jitted(beats.prefill, static_argnames=_SIZES)
extend = jitted(_extend, donate_argnums=1)
start = jitted(beats.start, static_argnames=_SIZES[1:], donate_argnums=2)
beat = jitted(beats.beat, static_argnames=("audio", "trace"), donate_argnums=1)
decode = jitted(beats.decode, static_argnames=("num_beats", "audio", "trace"), donate_argnums=1)
pausing_beat = jitted(beats.beat, donate_argnums=1)  # with rows that rest
_prefill_voice = jitted(beats.prefill_voice, static_argnames="size")
empty_reasoner_cache = jitted(
    lambda model, size: model.reasoner.llama.init_state(1, size), static_argnums=1
)
resized = jax.jit(kv_cache.resized, static_argnums=1)
insert_rows = jax.jit(states.insert_rows, donate_argnums=0)
extract_rows = jax.jit(states.extract_rows)
extract_reasoner = jax.jit(lambda state, slots: states.extract_rows(state, slots).reasoner)
end_rows = jax.jit(states.end_rows, donate_argnums=0)
empty_like = jax.jit(states.empty_like, static_argnums=1)
force = jax.jit(lambda state, forced: state._replace(forced=forced), donate_argnums=0)
joined = jax.jit(kv_cache.joined, static_argnums=1)


@functools.partial(jax.jit, static_argnums=3)
def _encode_voice(codec, wave, lengths, books):
    # Codes are decisions between near neighbours: the short cuts of accelerators' default precision would change some.
    with jax.default_matmul_precision("highest"):
        return codec.encode(wave, lengths, books)


_codec_step = jax.jit(lambda codec, codes, state: codec.decode_step(codes, state), donate_argnums=2)

BEATS_PER_CALL = 16
_FIRST_VOICE = 32  # smallest padded size of a voice, in frames and in tokens


def max_frames_of(config: ChromaConfig, max_seconds: float | None, voice_positions: int) -> int:
    """Frames that `max_seconds` of sound are; all that the context can hold for None.

    Raises:
      ValueError: max_seconds is no positive number, or is more than the context can hold even without text.
    """
    room = config.backbone.llama.max_positions - voice_positions - 1
    if max_seconds is None:
        return room
    number = isinstance(max_seconds, int | float | np.number) and not isinstance(max_seconds, bool)
    if not number or not 0 < max_seconds < np.inf:
        raise ValueError(f"max_seconds must be a positive, finite number, got {max_seconds!r:.60}")
    frames = max(1, int(np.ceil(min(max_seconds, 1e9) * config.codec.frame_rate - 1e-9)))
    if frames > room:
        raise ValueError(
            f"max_seconds {max_seconds!s:.40} is {frames} frames, but after this voice the context of "
            f"{config.backbone.llama.max_positions} positions holds at most {room} ({room / config.codec.frame_rate:.0f} s)"
        )
    return frames


def encode_voice(model: ChromaModel, wave: np.ndarray) -> np.ndarray:
    """Codes [F, Q] of one voice [N]."""
    return encoding_voice(model, wave).fetched()


def encoding_voice(model: ChromaModel, wave: np.ndarray) -> EncodedVoice:
    """`encode_voice` that does not wait: what follows can be traced and dispatched meanwhile."""
    codec = model.cfg.codec
    frames = -(-len(wave) // codec.frame_samples)
    size = bucket(
        frames, bucket_sizes(_FIRST_VOICE, max(frames, model.cfg.backbone.llama.max_positions))
    )
    padded = np.zeros((1, size * codec.frame_samples), np.float32)
    padded[0, : len(wave)] = wave
    codes = _encode_voice(
        model.codec, padded, np.array([len(wave)], np.int32), model.cfg.num_codebooks
    )
    return EncodedVoice(codes, frames)


def encode_voices(model: ChromaModel, batch: PromptBatch) -> tuple[np.ndarray, np.ndarray]:
    """Codes [B, F, Q] of the batch's voice waves and their numbers of frames [B]."""
    codec = model.cfg.codec
    codes = _encode_voice(
        model.codec, batch.voice_wave, batch.voice_lengths, model.cfg.num_codebooks
    )
    return np.asarray(codes), -(-batch.voice_lengths // codec.frame_samples)


def as_prompt(
    batch: PromptBatch, voice_frames: np.ndarray, voice_frame_lengths: np.ndarray
) -> Prompt:
    """The device-side prompt of a normalised batch and its voices' codes."""
    return Prompt(
        ids=batch.ids.astype(np.int32),
        lengths=batch.lengths.astype(np.int32),
        chunks=batch.chunks,
        chunk_lengths=batch.chunk_lengths.astype(np.int32),
        voice_ids=batch.voice_ids.astype(np.int32),
        voice_id_lengths=batch.voice_id_lengths.astype(np.int32),
        voice_frames=np.asarray(voice_frames, np.int32),
        voice_frame_lengths=np.asarray(voice_frame_lengths, np.int32),
    )


def prefill_voice(
    model: ChromaModel | FlatModule, ids: np.ndarray, voice: np.ndarray | EncodedVoice
) -> KVCache:
    """What the Backbone makes of one voice, transcript [P] and codes [F, Q], with room for the first beats of a reply."""
    limit = model.cfg.backbone.llama.max_positions

    def padded(x: np.ndarray, fill: int) -> np.ndarray:
        out = np.full((1, bucket(len(x), bucket_sizes(_FIRST_VOICE, limit)), *x.shape[1:]), fill)
        out[0, : len(x)] = x
        return out.astype(np.int32)

    if not isinstance(voice, EncodedVoice):
        voice = EncodedVoice(padded(voice, 0), len(voice))
    room = caches.voice_room(model.cfg, schedule.voice_length(len(ids), voice.frames))
    return _prefill_voice(
        model,
        padded(ids, model.cfg.reasoner.pad_token_id),
        np.array([len(ids)], np.int32),
        voice.codes,
        np.array([voice.frames], np.int32),
        size=room,
    )


def cache_sizes(config: ChromaConfig, prompt: Prompt, max_frames: int) -> CacheSizes:
    """Positions of the Reasoner's and the Backbone's cache that hold `max_frames` frames of each row without growing."""
    return caches.ledger_of(config, prompt, max_frames).limits


def begin(
    model: ChromaModel | FlatModule,
    prompt: Prompt,
    max_frames: int,
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    sizes: CacheSizes | None = None,
    forced_size: int = 0,
) -> BeatState:
    """Prefill of a batch with caches of these sizes, by default for `max_frames` frames of each row."""
    sizes = sizes or cache_sizes(model.cfg, prompt, max_frames)
    return prefill(
        model,
        prompt,
        controls(samplings),
        keys(seeds),
        np.full(len(seeds), max_frames, np.int32),
        reasoner_size=sizes.reasoner,
        backbone_size=sizes.backbone,
        forced_size=forced_size,
    )


_keys = jax.jit(jax.vmap(jax.random.key))


def keys(seeds: Sequence[int]) -> jax.Array:
    """One typed PRNG key [B] per request."""
    return _keys(np.asarray(seeds, np.uint32))


def time_codec(model: ChromaModel, frames: np.ndarray) -> float:
    """Seconds that the Codec alone takes over frames [T, Q], two at a time as in a beat, compilation left out."""
    state, codes = model.codec.init_decode_state(1), np.zeros((1, 2, frames.shape[1]), np.int32)
    # The first state is not yet tied to a device, so the second call may compile again.
    for _ in range(2):
        samples, state = _codec_step(model.codec, codes, state)
    jax.block_until_ready(samples)
    start = time.perf_counter()
    for t in range(0, len(frames), 2):
        codes[0, : len(frames[t : t + 2])] = frames[t : t + 2]
        samples, state = _codec_step(model.codec, codes, state)
    jax.block_until_ready(samples)
    return time.perf_counter() - start

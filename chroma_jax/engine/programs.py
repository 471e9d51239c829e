"""Running batches on the device: jitted entry points, cache sizes, and `generate` from arrays to arrays.

Axes: B batch, T frames, Q codebooks.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from chroma_jax import schedule
from chroma_jax.audio.batch import PromptBatch, bucket, bucket_sizes
from chroma_jax.config import ChromaConfig
from chroma_jax.engine import beat as beats
from chroma_jax.engine import caches
from chroma_jax.engine.beat import BeatState, Finish, Prompt
from chroma_jax.engine.caches import CacheLedger, CacheSizes
from chroma_jax.engine.sampling import Sampling, controls
from chroma_jax.engine.voice import EncodedVoice
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.flat import FlatModule, module_of
from chroma_jax.model.kv_cache import KVCache


def jitted(function: Callable, **options: Any) -> Callable:
    """jax.jit of a function of a model and other things; the model may be a `FlatModule`."""

    @functools.wraps(function)
    def opening(model, *args, **kwargs):
        return function(module_of(model), *args, **kwargs)

    return jax.jit(opening, **options)


# One compilation per set of static shapes, shared by all models of a process. States are donated.
prefill = jitted(beats.prefill, static_argnames=("reasoner_size", "backbone_size"))
extend = jitted(beats.extend, donate_argnums=1)
start = jitted(beats.start, static_argnames="backbone_size", donate_argnums=2)
_prefill_voice = jitted(beats.prefill_voice, static_argnames="size")
beat = jitted(beats.beat, static_argnames=("audio", "trace"), donate_argnums=1)
decode = jitted(beats.decode, static_argnames=("num_beats", "audio", "trace"), donate_argnums=1)


@functools.partial(jax.jit, static_argnums=3)
def _encode_voice(codec, wave, lengths, books):
    # Codes are decisions between near neighbours: the short cuts of accelerators' default precision would change some.
    with jax.default_matmul_precision("highest"):
        return codec.encode(wave, lengths, books)


_codec_step = jax.jit(lambda codec, codes, state: codec.decode_step(codes, state), donate_argnums=2)

BEATS_PER_CALL = 16
_FIRST_VOICE = 32  # smallest padded size of a voice, in frames and in tokens


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` gives, batch first; entries beyond a row's own count hold the pad id."""

    frames: np.ndarray  # [B, T, Q] int32
    num_frames: np.ndarray  # [B] int32
    text_tokens: np.ndarray  # [B, T'] int32, the final im_end included
    num_text_tokens: np.ndarray  # [B] int32
    audio: list[np.ndarray]  # B arrays float32 [num_frames * frame_samples], empty without audio
    finish_reason: list[str]  # "stop", "length" or "context"


def max_frames_of(config: ChromaConfig, max_seconds: float | None, voice_positions: int) -> int:
    """Frames that `max_seconds` of sound are; all that the context can hold for None.

    Raises:
      ValueError: max_seconds is not positive, or is more than the context can hold even without text.
    """
    room = config.backbone.llama.max_positions - voice_positions - 1
    if max_seconds is None:
        return room
    if not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive, got {max_seconds}")
    frames = int(np.ceil(max_seconds * config.codec.frame_rate - 1e-9))
    if frames > room:
        raise ValueError(
            f"max_seconds {max_seconds} is {frames} frames, but after this voice the context of "
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
    return caches.room_of(config, prompt, max_frames).limits


def begin(
    model: ChromaModel | FlatModule,
    prompt: Prompt,
    max_frames: int,
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    sizes: CacheSizes | None = None,
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
    )


_keys = jax.jit(jax.vmap(jax.random.key))


def keys(seeds: Sequence[int]) -> jax.Array:
    """One typed PRNG key [B] per request."""
    return _keys(np.asarray(seeds, np.uint32))


def run(
    model: ChromaModel | FlatModule,
    state: BeatState,
    max_frames: int,
    *,
    audio: bool = True,
    room: CacheLedger | None = None,
) -> Generated:
    """Beats until every row has ended, several per jitted call; the caches grow by `room`, if it is given."""
    left = max(1, -(-max_frames // schedule.FRAMES_PER_TEXT))
    outs = []
    while left > 0:
        # Powers of two: few compilations, and the last call is not much longer than it must be.
        count = min(BEATS_PER_CALL, 1 << (left - 1).bit_length())
        if room:
            state = room.make(state, count)
        state, out = decode(model, state, count, audio=audio)
        outs.append(jax.device_get(out))
        left -= count
        if room:
            room.without_text(slice(None), count - outs[-1].token_valid.sum(axis=0))
            room.leave(outs[-1].finish[-1] != Finish.RUNNING)
        if (outs[-1].finish[-1] != Finish.RUNNING).all():
            break
    return collect(model.cfg, outs, audio)


def collect(config: ChromaConfig, outs: list[beats.Beat], audio: bool) -> Generated:
    """What `beat.decode` gave in one or several calls, on the host, as arrays per row."""

    def joined(name: str) -> np.ndarray:  # [beats, B, ...] -> [B, beats, ...]
        return np.concatenate([getattr(out, name) for out in outs], axis=0).swapaxes(0, 1)

    frames, valid = joined("frames"), joined("frame_valid")
    batch, books = frames.shape[0], frames.shape[-1]
    frames, valid = frames.reshape(batch, -1, books), valid.reshape(batch, -1)
    num_frames = valid.sum(axis=1).astype(np.int32)
    tokens, token_valid = joined("token"), joined("token_valid")
    num_tokens = token_valid.sum(axis=1).astype(np.int32)
    sounds: list[np.ndarray] = []
    if audio:
        per_frame = config.codec.frame_samples
        sounds = [
            s.reshape(-1)[: n * per_frame]
            for s, n in zip(joined("samples"), num_frames, strict=True)
        ]
    # Valid frames, and valid tokens, are a prefix of each row.
    frames = np.where(valid[..., None], frames, config.codebook_pad_token_id)
    tokens = np.where(token_valid, tokens, config.reasoner.pad_token_id)
    return Generated(
        frames=frames[:, : num_frames.max(initial=0)].astype(np.int32),
        num_frames=num_frames,
        text_tokens=tokens[:, : num_tokens.max(initial=0)].astype(np.int32),
        num_text_tokens=num_tokens,
        audio=sounds,
        finish_reason=[finish_name(f) for f in outs[-1].finish[-1]],
    )


def finish_name(finish: int) -> str:
    """ "stop", "length", "context", ... of a Finish."""
    return Finish(int(finish)).name.lower()


def per_row(name: str, value, batch: int, kind: type | tuple[type, ...]) -> list:
    """One value per row from one for all or one each. Raises ValueError when the counts differ."""
    if isinstance(value, kind):
        return [value] * batch
    values = list(value)
    if len(values) != batch:
        raise ValueError(f"{name} has {len(values)} entries for a batch of {batch}")
    return values


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

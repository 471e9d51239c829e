"""What every face stands on: the model, its processor, and the voices that it has taken in."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import jax
import numpy as np

from chroma_jax.audio.batch import normalize_inputs, pack
from chroma_jax.audio.chat import Conversation
from chroma_jax.audio.prompt import Processor, VoiceArrays
from chroma_jax.config import ChromaConfig
from chroma_jax.engine import programs, reply
from chroma_jax.engine.prefill import Kept, Prefill
from chroma_jax.engine.reply import Chunk, Reply
from chroma_jax.engine.request import Request, check_choice, check_request, voice_arrays
from chroma_jax.engine.sampling import Sampling
from chroma_jax.engine.script import Script
from chroma_jax.engine.state import Prompt
from chroma_jax.engine.voice import EncodedVoice, KeptVoices, Voice, codec_name
from chroma_jax.model.chroma import ChromaModel
from chroma_jax.model.flat import FlatModule
from chroma_jax.model.kv_cache import KVCache
from chroma_jax.schedule import voice_length


class Engine:
    """A model with its processor. Immutable but for the voices it keeps; may be shared between threads.

    Args:
      model: the four stages.
      processor: tokenizer, chat format and sound settings.
      grow: whether the caches of a reply start small and grow with it, or have their final size from the start.
    """

    def __init__(self, model: ChromaModel, processor: Processor, *, grow: bool = True):
        self.model = model
        self.flat = FlatModule.of(model)  # the same, as the programs of every beat are given it
        self.processor = processor
        self.grow = grow
        self.voices = KeptVoices()

    @property
    def config(self) -> ChromaConfig:
        """Sizes and ids of the model."""
        return self.model.cfg

    def request(
        self,
        question: Conversation | None,
        voice: Voice,
        max_seconds: float | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        system_prompt: str | None = None,
        *,
        say: str | Script | None = None,
        after: Kept | None = None,
        keep: bool = False,
    ) -> Request:
        """A request, checked and ready for the device; arguments and errors as for `Chroma.reply`.

        Args:
          question: a question or conversation; None where there is something to say, and nothing was asked.
          voice: as are the next ones.
          max_seconds: longest answer.
          sampling: how text and codes are chosen.
          seed: of all that is drawn.
          system_prompt: replaces the default one.
          say: the words to speak instead of the Reasoner's own.
          after: a kept turn (`Stream.kept`); what `question` has in common with it is not taken in again.
          keep: whether this turn is kept when it is over.
        """
        sampling, seed = check_choice(sampling, seed)
        script = Script(say) if isinstance(say, str) else say
        asked, arrays, max_frames = check_request(
            self.processor, question, voice, max_seconds, system_prompt, script
        )
        common = after.reusable(self.config, asked) if after is not None else 0
        if common:
            prompt = Prefill(self.config, after, common)
            prompt.add_question(asked, common)
        else:
            batch = normalize_inputs(self.config, pack([(asked, arrays)]))
            prompt = Prompt(
                batch.ids, batch.lengths, batch.chunks, batch.chunk_lengths, *[None] * 4
            )
        if script is not None:
            script.claim()
        taken_in = self.prefill_voice(voice, arrays)
        return Request(prompt, *taken_in, max_frames, sampling, seed, script, asked, keep)

    def encode_voice(self, voice: Voice) -> np.ndarray:
        """The voice's codes [F, Q], computed once per voice and codec."""
        self._encoded(voice)
        return voice.codes(self.codec_id)

    def prefill_voice(self, voice: Voice, arrays: VoiceArrays | None = None) -> tuple[KVCache, int]:
        """What the Backbone makes of the voice, and its positions; kept on the device for the voices used last.

        Args:
          voice: the voice.
          arrays: its arrays, where they are known.
        """

        def make() -> tuple[KVCache, int]:
            given = arrays or voice_arrays(self.processor, voice)
            encoded = self._encoded(voice, given)
            cache = programs.prefill_voice(self.flat, given.ids, encoded)
            frames = -(-len(given.wave) // self.config.codec.frame_samples)
            return cache, voice_length(len(given.ids), frames)

        return self.voices.get(voice, make)

    def join(self, chunks: Sequence[Chunk], finish_reason: str) -> Reply:
        """Chunks of one stream, in order, as one reply."""
        return reply.join(self.config, self.processor.tokenizer, chunks, finish_reason)

    def _encoded(
        self, voice: Voice, arrays: VoiceArrays | None = None
    ) -> np.ndarray | EncodedVoice:
        """The voice's codes, which the device may still be computing."""
        codes = voice._codes.get(self.codec_id)
        if codes is None:
            wave = (arrays or voice_arrays(self.processor, voice)).wave
            codes = voice._codes[self.codec_id] = programs.encoding_voice(self.model, wave)
        if isinstance(codes, EncodedVoice) and codes.codes.devices() != self._devices:
            return codes.fetched()  # another model with this codec, elsewhere
        return codes

    @functools.cached_property
    def _devices(self) -> set[jax.Device]:
        return jax.tree.leaves(self.model.codec)[0].devices()

    @functools.cached_property
    def codec_id(self) -> str:
        """Voices saved with one codec's codes are encoded anew for another."""
        digest = hashlib.sha256()
        # A few values of every parameter tell codecs apart.
        for few in jax.device_get(
            _first_values([x for x in jax.tree.leaves(self.model.codec) if x.ndim])
        ):
            digest.update(few.tobytes())
        return codec_name(digest.hexdigest()[:16], self.config)


@jax.jit
def _first_values(arrays: list[jax.Array]) -> list[jax.Array]:
    return [x.reshape(-1)[:64] for x in arrays]

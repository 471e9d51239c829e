"""The checkpoint that training from scratch begins with: random weights, a tokenizer of the data's texts, codebooks of its sound.

Nothing in it can speak or think yet. Codebooks are not left random: codewords that no sound comes near give every frame the
same codes, and nothing to learn. They are set by k-means on what each codebook has to quantize, as the first step of a
codec's training does (SoundStream, arXiv 2107.03312, section III-C).

Axes: B rows, N samples, n frames, D latent width, C codeword width, V codewords.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chroma_jax import checkpoint, paths
from chroma_jax.audio.prompt import DEFAULT_SYSTEM_PROMPT
from chroma_jax.audio.tokenizer import IM_START
from chroma_jax.audio.wav import load_audio
from chroma_jax.checkpoint import params
from chroma_jax.checkpoint.codec_files import load_any_codec
from chroma_jax.checkpoint.staging import check_target
from chroma_jax.checkpoint.whisper import encoder_arrays, read_whisper
from chroma_jax.config import ChromaConfig
from chroma_jax.data.manifest import BadRow, Row, read_manifest
from chroma_jax.model.chroma import ChromaModel, random_model
from chroma_jax.model.codec import Codec
from chroma_jax.model.codec.quantizer import ResidualQuantizer
from chroma_jax.model.codec.seanet import shrink

if TYPE_CHECKING:
    import tokenizers

# The texts that every prompt holds beside the data's (see `chroma_jax.audio.chat`).
_FRAME_TEXTS = (DEFAULT_SYSTEM_PROMPT, "system\n", "user\n", "assistant\n")
_PIECE_SECONDS, _ROWS = 4, 8  # sound goes through the codec in pieces of this, so many at a time
_ROUNDS = 20  # of k-means
_LEVEL, _LEVEL_FRAMES = (
    0.1,
    48,
)  # root mean square of speech, and of how many decoded frames it is taken


def create(
    out: str | os.PathLike,
    sizes: ChromaConfig,
    manifest: str | os.PathLike,
    *,
    vocab_size: int = 1024,
    codebook_seconds: float = 600.0,
    ears: str = "",
    codec: str = "",
    seed: int = 0,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> ChromaConfig:
    """Writes the checkpoint, and returns its configuration.

    Args:
      out: the directory to make.
      sizes: the model; its text vocabulary and the ids in it are replaced by the tokenizer's.
      manifest: of the data, see `chroma_jax.data.manifest`.
      vocab_size: of the tokenizer at most, 256 bytes and the control tokens included.
      codebook_seconds: how much of the answers' sound the codebooks are made from, at most.
      ears: whose first layers the Reasoner's audio encoder begins with: "whisper-base", or the directory of a Whisper in CTranslate2's
        format; "" for random ones.
      codec: a Codec that was trained, in Mimi's layout, or a Chroma with one: its sizes and weights are taken as they are. "" for random
        weights and codebooks of the data's sound.
      seed: of the weights.
      overwrite: whether a checkpoint at `out` may be replaced.
      say: told, a line each, what happens.

    Raises:
      ValueError: a manifest with bad rows or too little sound, a vocabulary that is too small, ears that are not there or do not fit, an
        `out` that cannot be written.
    """
    out, manifest = paths.expand(out), paths.expand(manifest)
    codec = paths.expand(codec) if codec else ""
    rows = []
    for row in read_manifest(manifest).rows:
        if isinstance(row, BadRow):
            raise ValueError(f"{manifest}:{row.line}: {row.reason}")
        rows.append(row)
    given = [manifest, *([codec] if codec else []), *(row.answer_audio for row in rows)]
    inside = [file for file in given if paths.within(file, out)]
    if inside:  # --overwrite takes all that is there away
        raise ValueError(f"{out} holds an input, {inside[0]}; choose another --out")
    check_target(out, overwrite)
    trained = None
    if codec:
        speaks, trained = load_any_codec(codec)
        sizes = dataclasses.replace(sizes, codec=speaks)
    heard = encoder_arrays(read_whisper(ears), sizes.reasoner.audio) if ears else {}
    backend = train_tokenizer([*_FRAME_TEXTS, *_texts(rows)], vocab_size)
    config = with_vocabulary(sizes, backend)
    say(f"tokenizer: {backend.get_vocab_size()} tokens, learned from the texts of {len(rows)} rows")
    model = _with_ears(random_model(config, seed), heard)
    if heard:
        say(f"ears: convolutions and {config.reasoner.audio.num_layers} layers of {ears}")
    if trained is None:
        waves = _waves(rows, config, codebook_seconds)
        model.codec, bits = fit_codebooks(model.codec, waves, np.random.default_rng(seed))
        say(
            f"codebooks: {config.codec.codebook_size} codewords each; the codes of the data's sound have "
            f"{' '.join(f'{b:.1f}' for b in bits)} bits of {np.log2(config.codec.codebook_size):.1f}"
        )
    else:
        model.codec = trained
        say(f"codec: that of {codec}, as it was trained")
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "tokenizer.json")
        backend.save(file)
        checkpoint.save(out, config, model, [file], overwrite=overwrite)
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    say(f"{out}: {size:,} weights; nothing in it can speak yet")
    return config


def _with_ears(model: ChromaModel, heard: Mapping[str, np.ndarray]) -> ChromaModel:
    """The model with these parameters of its audio encoder, which are named from there on."""
    arrays = params.flatten(model)
    for name, array in heard.items():
        path = f"reasoner/audio_encoder/{name}"
        arrays[path] = jnp.asarray(array, arrays[path].dtype)
    return params.build(model, arrays)


def _texts(rows: Sequence[Row]) -> Iterator[str]:
    """Everything that the tokenizer will be asked for."""
    for row in rows:
        yield row.answer_text
        if row.voice_text is not None:
            yield row.voice_text
        yield from (turn.text for turn in row.turns if turn.text is not None)


# --- the tokenizer ---


_CONTROL = (
    IM_START,
    "<|endoftext|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|text_start|>",
    "<|text_end|>",
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of these texts, and the control tokens behind it.

    Of few texts it learns whole words, which speech has room for: a token takes 160 ms.

    Raises:
      ValueError: no room for 256 bytes and the control tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 256 + len(_CONTROL):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(_CONTROL)} control tokens want {256 + len(_CONTROL)}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(list(_CONTROL))
    return backend


def with_vocabulary(config: ChromaConfig, backend: tokenizers.Tokenizer) -> ChromaConfig:
    """`config` with the vocabulary and the ids of a tokenizer that `train_tokenizer` made."""
    ids = {token: backend.token_to_id(token) for token in _CONTROL}
    reasoner = dataclasses.replace(
        config.reasoner,
        vocab_size=-(-backend.get_vocab_size() // 64) * 64,  # divides over devices
        pad_token_id=ids["<|endoftext|>"],
        audio_token_id=ids["<|AUDIO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
    )
    return dataclasses.replace(
        config,
        reasoner=reasoner,
        im_end_token_id=ids["<|im_end|>"],
        text_start_token_id=ids["<|text_start|>"],
        text_end_token_id=ids["<|text_end|>"],
    )


# --- the codebooks ---


def _waves(rows: Sequence[Row], config: ChromaConfig, seconds: float) -> Iterator[np.ndarray]:
    """The sound that becomes codes, until there is enough of it."""
    rate = config.codec.sampling_rate
    left = int(seconds * rate)
    for row in rows:
        for file in (row.answer_audio, row.voice_audio):
            if file is not None and left > 0:
                wave = load_audio(file, rate)[:left]
                left -= len(wave)
                yield wave


def fit_codebooks(
    codec: Codec, waves: Iterable[np.ndarray], rng: np.random.Generator
) -> tuple[Codec, list[float]]:
    """The codec with codebooks made by k-means from these waves [N], each from what those before it leave over.

    What it decodes is made as loud as speech: a random decoder's noise may be of any level.

    Returns:
      The codec, and the entropy in bits of the waves' codes, per codebook.

    Raises:
      ValueError: fewer frames of sound than codewords.
    """
    latents = _latents(codec, waves)
    wanted = codec.cfg.codebook_size
    if len(latents) < wanted:
        raise ValueError(
            f"the data's sound has {len(latents)} frames: {wanted} codewords want at least as many, "
            f"{wanted / codec.cfg.frame_rate:.0f} s"
        )
    codec = nnx.clone(codec)
    bits = []
    for quantizer in (codec.quantizer.semantic, codec.quantizer.acoustic):
        bits += _fit(quantizer, latents, rng)
    _set_level(codec, latents[:_LEVEL_FRAMES])
    return codec, bits


def _latents(codec: Codec, waves: Iterable[np.ndarray]) -> np.ndarray:
    """What the quantizers get: [n, D], all frames of all waves. Longer waves are cut into pieces."""
    cfg = codec.cfg
    size = _PIECE_SECONDS * cfg.sampling_rate // cfg.frame_samples * cfg.frame_samples
    pieces = [wave[at : at + size] for wave in waves for at in range(0, len(wave), size)]
    run = jax.jit(_run)
    out = [np.zeros((0, cfg.hidden_size), np.float32)]
    for start in range(0, len(pieces), _ROWS):
        batch = np.zeros((_ROWS, size), np.float32)
        lengths = np.ones(_ROWS, np.int32)
        some = pieces[start : start + _ROWS]
        for i, piece in enumerate(some):
            batch[i, : len(piece)], lengths[i] = piece, len(piece)
        latents = np.asarray(run(codec, batch, lengths))
        out += [latents[i, : -(-len(piece) // cfg.frame_samples)] for i, piece in enumerate(some)]
    return np.concatenate(out)


def _run(codec: Codec, wave: jax.Array, lengths: jax.Array) -> jax.Array:
    x = codec.encoder_transformer(codec.encoder(wave[..., None], lengths))
    return codec.downsample(x, shrink(lengths, codec.cfg.encoder_hop)).astype(jnp.float32)


def _fit(
    quantizer: ResidualQuantizer, latents: np.ndarray, rng: np.random.Generator
) -> list[float]:
    """Sets the codebooks of a quantizer in place; returns the entropy of each one's codes in bits."""
    x = latents
    if quantizer.input_proj is not None:
        x = x @ np.asarray(quantizer.input_proj[...], np.float32)
    count, size, _ = quantizer.embed_sum.shape
    books, bits = [], []
    for _ in range(count):
        book = k_means(x, size, rng)
        codes = _nearest(x, book)
        x = x - book[codes]
        share = np.bincount(codes, minlength=size) / len(codes)
        bits.append(float(-(share * np.log2(np.maximum(share, 1e-12))).sum()))
        books.append(book)
    quantizer.embed_sum = nnx.Param(jnp.asarray(np.stack(books)))
    quantizer.cluster_usage = nnx.Param(jnp.ones((count, size), jnp.float32))
    return bits


def _set_level(codec: Codec, latents: np.ndarray) -> None:
    """Scales the decoder's last convolution in place so that these latents [n, D] become sound of speech's level."""
    wave = jax.jit(lambda c, x: c.decode(c.quantizer.encode(x)))(codec, latents[None])
    scale = _LEVEL / max(float(jnp.sqrt(jnp.mean(wave**2))), 1e-6)
    last = codec.decoder.layers[-1]
    last.kernel = nnx.Param(last.kernel[...] * scale)
    last.bias = nnx.Param(last.bias[...] * scale)


def k_means(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` centres [count, C] of the points x [n, C], n >= count."""
    centres = x[rng.choice(len(x), count, replace=False)]
    for _ in range(_ROUNDS):
        nearest = _nearest(x, centres)
        members = np.bincount(nearest, minlength=count)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, x)
        # A centre that has lost its points stays where it is.
        centres = np.where(
            members[:, None] > 0, sums / np.maximum(members, 1)[:, None], centres
        ).astype(np.float32)
    return centres


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[n, C], [V, C] -> the index [n] of the nearest centre."""
    return np.argmin((centres**2).sum(1) - 2 * (x @ centres.T), axis=1)

"""Our Reasoner against transformers' Qwen2.5-Omni Thinker with random weights; both read the same configuration keys."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax.audio.mel import mel_chunks
from chroma_jax.model.llama import Llama
from chroma_jax.model.reasoner import Reasoner

from .torch_weights import load, near, randomise, reasoner_config, tensors_of, torch

thinker = pytest.importorskip("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")

AUDIO, START, END, PAD = 500, 503, 504, 506
TEXT = dict(
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    vocab_size=512,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    tie_word_embeddings=False,
)
OLD_ROPE = dict(
    rope_parameters=None,
    rope_theta=300.0,
    rope_scaling={"type": "default", "mrope_section": [3, 1, 4]},
)
EARS = dict(
    num_mel_bins=20,
    d_model=24,
    encoder_ffn_dim=36,
    encoder_layers=2,
    encoder_attention_heads=3,
    n_window=10,
    output_dim=32,
)
# Changes of the text model, of the audio encoder, and whether the head is tied.
CONFIGS = {
    "gqa": ({}, {}, False),
    "mha, tied": (dict(num_key_value_heads=4, rms_norm_eps=0.1), dict(n_window=4), True),
    "mqa, old rope spelling": (
        dict(num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=3) | OLD_ROPE,
        dict(n_window=30, num_mel_bins=128, encoder_attention_heads=1, encoder_layers=3),
        False,
    ),
    "one window, tied": (
        dict(hidden_size=48, num_attention_heads=8) | OLD_ROPE,
        dict(n_window=50, d_model=32, encoder_attention_heads=8, encoder_layers=1, output_dim=48),
        True,
    ),
}
# Mel frames of the clips of each row: whole chunks, partial ones, one that gives a single feature, none.
CLIPS = [[45, 20, 3], [73], [], [19, 60]]


def values_of(text, audio, tied):
    """`thinker_config` of config.json."""
    text = {k: v for k, v in (TEXT | text | {"tie_word_embeddings": tied}).items() if v is not None}
    ids = dict(audio_token_index=AUDIO, audio_start_token_id=START, audio_end_token_id=END)
    parts = {"text_config": text, "audio_config": EARS | audio}
    return ids | parts | {"pad_token_id": PAD, "tie_word_embeddings": tied}


def checkpoint_name(name):
    """The Thinker's tensor names in a checkpoint."""
    if name.startswith("lm_head."):
        return f"thinker.{name}"
    name = name.removeprefix("model.")
    return "thinker." + name.replace("language_model.", "model.", 1)


def pair(text, audio, tied):
    """(the Thinker, our Reasoner) with the same weights."""
    values = values_of(text, audio, tied)
    eyes = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    others = dict(vision_config=eyes, image_token_index=501, video_token_index=502)
    others |= dict(
        vision_start_token_id=507, vision_end_token_id=508
    )  # read even where nothing is seen
    config = thinker.Qwen2_5OmniThinkerConfig(**copy.deepcopy(values), **others)
    oracle = thinker.Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    randomise(oracle)
    assert (oracle.lm_head.weight is oracle.model.language_model.embed_tokens.weight) == tied
    tensors = tensors_of(oracle, checkpoint_name)
    if tied:
        del tensors["thinker.lm_head.weight"]
    cfg = reasoner_config(values)
    assert cfg.tie_embeddings == tied
    return oracle, load(lambda: Reasoner(cfg, rngs=nnx.Rngs(0)), "reasoner", tensors)


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def models(request):
    return pair(*request.param)


def questions(cfg, clips=CLIPS, seed=0):
    """Token ids and mels of each row: text, then each clip between its marks and more text."""
    rng = np.random.default_rng(seed)
    rows, mels = [], []
    for lengths in clips:
        ids = list(rng.integers(0, 500, 3))
        for frames in lengths:
            placeholders = [AUDIO] * cfg.audio.num_features(frames)
            ids += [START, *placeholders, END, *rng.integers(0, 500, 2)]
        rows.append(np.array(ids))
        mels.append([rng.standard_normal((m, cfg.audio.num_mel_bins), np.float32) for m in lengths])
    return rows, mels


def oracle_features(oracle, mels):
    """Features of all clips of all rows, one after another; None without clips."""
    clips = [mel for row in mels for mel in row]
    if not clips:
        return None
    lengths = torch.tensor([len(mel) for mel in clips])
    packed = torch.tensor(np.concatenate(clips).T)
    with torch.no_grad():
        return oracle.model.audio_tower(packed, feature_lens=lengths).last_hidden_state.numpy()


def oracle_outputs(oracle, rows, mels):
    """Hidden states and logits of each row, in one left-padded batch."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = torch.tensor(row), 1
    clips, audio = [mel for row in mels for mel in row], {}
    if clips:
        frames = max(map(len, clips))
        features = torch.zeros((len(clips), clips[0].shape[1], frames))
        heard = torch.zeros((len(clips), frames), dtype=torch.long)
        for i, mel in enumerate(clips):
            features[i, :, : len(mel)], heard[i, : len(mel)] = torch.tensor(mel.T), 1
        audio = dict(input_features=features, feature_attention_mask=heard)
    with torch.no_grad():
        hidden = oracle.model(input_ids=ids, attention_mask=mask, **audio)[0]
        logits = oracle(input_ids=ids, attention_mask=mask, **audio).logits
    return [
        (hidden[i, length - len(row) :].numpy(), logits[i, length - len(row) :].numpy())
        for i, row in enumerate(rows)
    ]


def our_inputs(cfg, rows, mels):
    """Right-padded ids [B, T] and lengths; chunks [B, C, M, F] and their lengths, or None without clips."""
    width = max(map(len, rows)) + 3
    ids = np.full((len(rows), width), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows])
    cut = [mel_chunks(row, cfg.audio.chunk_frames) for row in mels]
    count = max(len(n) for _, n in cut)
    if not count:
        return ids, lengths, None
    chunks = np.full(
        (len(rows), count, cfg.audio.chunk_frames, cfg.audio.num_mel_bins), 7.0, np.float32
    )
    chunk_lengths = np.zeros((len(rows), count), np.int32)
    for i, (c, n) in enumerate(cut):
        if len(n):
            chunks[i, : len(n)], chunk_lengths[i, : len(n)] = c, n
    return ids, lengths, (chunks, chunk_lengths)


@jax.jit
def hear(model, chunks, chunk_lengths):
    return model.encode_audio(chunks, chunk_lengths)


@jax.jit
def think(model, ids, features):
    hidden = model(ids, features)
    return hidden, model.logits(hidden)


def our_outputs(model, rows, mels):
    """Hidden states and logits of each row, in one right-padded batch."""
    ids, lengths, audio = our_inputs(model.cfg, rows, mels)
    hidden, logits = think(model, ids, None if audio is None else hear(model, *audio))
    return [(hidden[i, :n], logits[i, :n]) for i, n in enumerate(lengths)]


def test_audio_features(models):
    """A row's features, clip after clip, whatever the last chunks of its clips."""
    oracle, model = models
    _, mels = questions(model.cfg)
    _, _, audio = our_inputs(model.cfg, [np.zeros(1)] * len(mels), mels)
    features = hear(model, *audio)
    for i, row in enumerate(mels):
        if row:
            want = oracle_features(oracle, [row])
            assert np.std(want, axis=0).min() > 0.05  # they differ from one to the next
            near(features[i, : len(want)], want)


def test_hidden_states_and_logits(models):
    """Rows of audio and text, with several clips, in one batch: padded left there, right here."""
    oracle, model = models
    rows, mels = questions(model.cfg)
    want = oracle_outputs(oracle, rows, mels)
    assert len(np.unique(np.concatenate([logits.argmax(-1) for _, logits in want]))) > 10
    for got, (hidden, logits) in zip(our_outputs(model, rows, mels), want, strict=True):
        near(got[0], hidden)
        near(got[1], logits)


def test_a_row_alone(models):
    """Each row gives alone what it gives in the batch, and what the oracle gives for it alone."""
    oracle, model = models
    rows, mels = questions(model.cfg)
    together = our_outputs(model, rows, mels)
    for i in (0, 2):
        ((hidden, logits),) = our_outputs(model, rows[i : i + 1], mels[i : i + 1])
        near(together[i][0], hidden)
        near(together[i][1], logits)
        ((_, want),) = oracle_outputs(oracle, rows[i : i + 1], mels[i : i + 1])
        near(logits, want)


def test_text_only(models):
    oracle, model = models
    rows, mels = questions(model.cfg, [[], []], seed=3)
    rows = [np.concatenate([rows[0], rows[1]]), rows[1]]
    want = oracle_outputs(oracle, rows, mels)
    for got, (hidden, logits) in zip(our_outputs(model, rows, mels), want, strict=True):
        near(got[0], hidden)
        near(got[1], logits)


def test_audio_is_heard(models):
    """The equality above is not empty: another sound gives other logits after it, and only after it."""
    _, model = models
    rows, mels = questions(model.cfg, [[45]])
    (want,) = our_outputs(model, rows, mels)
    (got,) = our_outputs(model, rows, [[-mels[0][0]]])
    np.testing.assert_array_equal(got[1][:4], want[1][:4])
    assert np.abs(got[1][-1] - want[1][-1]).max() > 0.1


def test_prefill_and_steps(models):
    """The answer's tokens, one at a time and at another position in each row."""
    oracle, model = models
    rows, mels = questions(model.cfg)
    answer = np.random.default_rng(5).integers(0, 500, (len(rows), 3))
    want = oracle_outputs(
        oracle, [np.append(r, a) for r, a in zip(rows, answer, strict=True)], mels
    )
    ids, lengths, audio = our_inputs(model.cfg, rows, mels)
    size = ids.shape[1] + 3
    features = hear(model, *audio)
    hidden, cache = jax.jit(Reasoner.prefill, static_argnums=4)(
        model, ids, jnp.asarray(lengths), features, size
    )
    for i, n in enumerate(lengths):
        near(hidden[i, :n], want[i][0][:n])
    step = jax.jit(Reasoner.step)
    for t in range(3):
        hidden, cache = step(model, answer[:, t], cache, jnp.ones(len(rows), bool))
        logits = model.logits(hidden)
        for i, n in enumerate(lengths):
            near(hidden[i], want[i][0][n + t])
            near(logits[i], want[i][1][n + t])


def sections(*counts, theta=1000.0):
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": [*counts]}
    }


SECTIONS = {
    "2+3+3": sections(2, 3, 3),
    "6+1+1": sections(6, 1, 1, theta=400.0),
    "3+1+4, old spelling": OLD_ROPE,
    "2+4+6, mha": sections(2, 4, 6) | dict(head_dim=24, num_key_value_heads=4),
}


@pytest.mark.parametrize("text", SECTIONS.values(), ids=SECTIONS.keys())
def test_three_position_components(text):
    """The text model alone, on embeddings at unequal time, height and width positions."""
    values = values_of(text, {}, False)
    config = thinker.Qwen2_5OmniTextConfig(**copy.deepcopy(values["text_config"]))
    oracle = thinker.Qwen2_5OmniThinkerTextModel(config).eval()
    randomise(oracle)
    tensors = tensors_of(
        oracle, lambda name: None if name == "embed_tokens.weight" else f"thinker.model.{name}"
    )
    cfg = reasoner_config(values).text
    assert cfg.rope.sections is not None and cfg.qkv_bias
    model = load(lambda: Llama(cfg, rngs=nnx.Rngs(0)), "reasoner/llama", tensors)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 19, cfg.hidden_size), np.float32)
    positions = np.cumsum(rng.integers(0, 30, (3, 2, 19)), axis=-1)
    with torch.no_grad():
        out = oracle(inputs_embeds=torch.tensor(x), position_ids=torch.tensor(positions))
    call = jax.jit(lambda model, *args: model(*args))
    got = call(model, x, positions)
    near(got, out.last_hidden_state.numpy())
    # Each component matters, and so does which frequencies follow it.
    for other in ([0, 1, 1], [0, 2, 2], [1, 1, 2], [1, 0, 2]):
        assert np.abs(call(model, x, positions[other]) - got).max() > 1e-2
    swapped = dataclasses.replace(cfg.rope, sections=cfg.rope.sections[::-1])
    changed = dataclasses.replace(cfg, rope=swapped)
    model = load(lambda: Llama(changed, rngs=nnx.Rngs(0)), "reasoner/llama", tensors)
    assert np.abs(call(model, x, positions) - got).max() > 1e-2

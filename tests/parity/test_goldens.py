"""The whole system against numbers of the public PyTorch code (float32, CPU): tokens, codes and samples must be the same.

Every generation case runs from the Hub directory, from the converted one, and from one exported and read again.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax import schedule
from chroma_jax.audio.batch import normalize_inputs
from chroma_jax.audio.mel import mel_chunks
from chroma_jax.checkpoint import convert, export, load_converted, load_torch
from chroma_jax.engine import beat, programs
from chroma_jax.engine.sampling import Sampling, controls
from chroma_jax.generation.session import Chroma
from chroma_jax.model.chroma import abstract_model
from chroma_jax.model.dispatch import Dispatch, dispatch

CASES = ["single", "text_ends_early", "long_audio", "left_padded_batch"]
INPUTS = {
    "question_ids": "thinker_input_ids",
    "question_mask": "thinker_attention_mask",
    "mel": "thinker_input_features",
    "mel_mask": "thinker_feature_attention_mask",
    "voice_ids": "input_ids",
    "voice_mask": "attention_mask",
    "voice_wave": "input_values",
    "voice_lengths": "input_values_cutoffs",
}


def near(got, want, tolerance=1e-4):
    """Within `tolerance` of the largest magnitude."""
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance * np.abs(want).max())


def inputs_of(cases, case):
    return {ours: cases[f"{case}/in/{theirs}"] for ours, theirs in INPUTS.items()}


def with_config(model, **changes):
    """The same parameters under a changed configuration."""
    graphdef, _ = nnx.split(abstract_model(dataclasses.replace(model.cfg, **changes)))
    return nnx.merge(graphdef, nnx.state(model))


def for_case(model, cases, case):
    """Each case has its own end-of-text token."""
    return with_config(model, im_end_token_id=int(cases[f"{case}/im_end_token_id"]))


@pytest.fixture(scope="module", params=["hub_directory", "converted", "exported_and_read_again"])
def model(request, golden_dir, tmp_path_factory):
    if request.param == "hub_directory":
        return load_torch(golden_dir)[1]
    root = tmp_path_factory.mktemp(request.param)
    convert(golden_dir, root / "converted")
    if request.param == "converted":
        return load_converted(root / "converted")[1]
    export(root / "converted", root / "exported")
    return load_torch(root / "exported")[1]


@pytest.mark.parametrize("case", CASES)
def test_generate_gives_the_same_frames_text_and_sound(model, golden, cases, case):
    want = cases[f"{case}/frames"]
    chroma = Chroma(for_case(model, cases, case), golden.processor)
    out = chroma.generate(inputs_of(cases, case), max_frames=want.shape[1])
    np.testing.assert_array_equal(out.frames, want)
    np.testing.assert_array_equal(out.num_frames, want.shape[1])
    np.testing.assert_array_equal(out.text_tokens, cases[f"{case}/text_tokens"])
    np.testing.assert_array_equal(out.num_text_tokens, cases[f"{case}/text_tokens"].shape[1])
    near(np.stack(out.audio), cases[f"{case}/audio"][:, 0])
    assert out.finish_reason == ["length"] * len(want)


@pytest.mark.parametrize("case", CASES)
def test_intermediate_values(golden, cases, case):
    """Hidden states and logits of every beat, each row laid out alone by its own lengths."""
    model = for_case(golden.model, cases, case)
    batch = normalize_inputs(model.cfg, inputs_of(cases, case))
    prompt = programs.as_prompt(batch, *programs.encode_voices(model, batch))
    frames, rows = cases[f"{case}/frames"].shape[1], len(batch.lengths)
    state = programs.begin(model, prompt, frames, [Sampling()] * rows, [0] * rows)
    near(state.hidden, cases[f"{case}/reasoner_last_hidden"][:, 0])
    near(model.reasoner.logits(state.hidden), cases[f"{case}/prefill/reasoner_logits_last"])
    _, out = programs.decode(model, state, frames // 2, audio=False, trace=True)
    by_row = jax.tree.map(lambda x: np.swapaxes(x, 0, 1), out)

    def flat(x):
        return x.reshape(rows, frames, *x.shape[3:])

    trace = by_row.trace
    near(flat(trace.backbone_hidden), cases[f"{case}/backbone_hidden"])
    near(flat(trace.code0_logits), cases[f"{case}/c0_logits"])
    near(flat(trace.code_logits)[:, :8], cases[f"{case}/decoder_logits"])
    steps = cases[f"{case}/reasoner_last_hidden"].shape[1]
    near(trace.reasoner_hidden[:, :steps], cases[f"{case}/reasoner_last_hidden"])


@pytest.mark.parametrize("case", CASES)
def test_prefill(golden, cases, case):
    """Reasoner states over the whole prompt, and the Backbone's inputs up to H_0 E_0."""
    model = golden.model
    batch = normalize_inputs(model.cfg, inputs_of(cases, case))
    features = jax.jit(lambda m: m.reasoner.encode_audio(batch.chunks, batch.chunk_lengths))(model)
    hidden = jax.jit(lambda m: m.reasoner(batch.ids, features))(model)
    prompt = programs.as_prompt(batch, *programs.encode_voices(model, batch))
    lengths = (prompt.voice_id_lengths, prompt.voice_frame_lengths)
    one = np.ones(len(batch.lengths), np.int32)
    where = schedule.layout(*lengths, one, 0 * one, 64)
    first = cases[f"{case}/text_tokens"][:, :1]
    h0 = cases[f"{case}/reasoner_last_hidden"][:, :1]
    x = schedule.embed(model, where, prompt.voice_ids, prompt.voice_frames, h0, first)
    question_mask = cases[f"{case}/in/thinker_attention_mask"].astype(bool)
    backbone_mask = cases[f"{case}/prefill/backbone_attention_mask"].astype(bool)
    assert (cases[f"{case}/prefill/rope_deltas"] <= 0).all()  # padding only: no position is skipped
    for b, length in enumerate(batch.lengths):
        near(hidden[b, :length], cases[f"{case}/prefill/reasoner_hidden"][b][question_mask[b]])
        want = cases[f"{case}/prefill/backbone_embeddings"][b][backbone_mask[b]]
        near(x[b, : len(want)], want)
        assert (np.asarray(where.kind[b, len(want) :]) == schedule.Kind.PAD).all()


# The choices by kind of device and by size at their extremes: the golden model is small, and alone takes the plain ways. (The splash
# kernel, which is interpreted here for minutes, is held against the plain way in tests/model/test_attention.py.)
WAYS = {
    "parts, sums": Dispatch(platform="cpu", parts_from=0, taps_up_to=1 << 30),
    "padded, together": Dispatch(platform="tpu", together_rows=1, together_queries=1 << 30),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_of_products_and_attention(golden, cases, way):
    """The prompt and the first four beats, samples included, each part by that way."""
    model, frames = for_case(golden.model, cases, "single"), 8
    batch = normalize_inputs(model.cfg, inputs_of(cases, "single"))
    with dispatch(WAYS[way]):
        prompt = programs.as_prompt(batch, *programs.encode_voices(model, batch))
        state = programs.begin(model, prompt, frames, [Sampling()], [0])
        near(state.hidden, cases["single/reasoner_last_hidden"][:, 0])
        _, out = programs.decode(model, state, frames // 2, trace=True)
    for name, got in {
        "frames": out.frames,
        "c0_logits": out.trace.code0_logits,
        "decoder_logits": out.trace.code_logits,
    }.items():
        want = cases[f"single/{name}"][0, :frames]
        near(np.reshape(got, want.shape), want)
    audio = cases["single/audio"][0, 0, : frames * 1920]
    near(np.ravel(out.samples), audio)


def test_audio_encoder(golden, cases):
    mel, mask = cases["audio_tower/mel"], cases["audio_tower/mel_mask"].astype(bool)
    clips = [m.T[valid] for m, valid in zip(mel, mask, strict=True)]
    chunks, lengths = mel_chunks(clips, golden.config.reasoner.audio.chunk_frames)
    features = jax.jit(lambda m: m.reasoner.encode_audio(chunks[None], lengths[None]))(golden.model)
    want = cases["audio_tower/features_packed"]
    assert len(want) == sum(golden.config.reasoner.audio.num_features(len(c)) for c in clips)
    near(features[0, : len(want)], want)


def test_three_component_positions(golden, cases):
    hidden = jax.jit(lambda m, x, p: m.reasoner.llama(x, p))(
        golden.model, cases["tm_rope/embeddings"], cases["tm_rope/position_ids"]
    )
    near(hidden, cases["tm_rope/hidden"])


def test_codec(golden, cases):
    codes = jax.jit(lambda m, w: m.codec.encode(w))(golden.model, cases["codec/wave"][:, 0])
    np.testing.assert_array_equal(np.swapaxes(codes, 1, 2), cases["codec/codes"])
    given = np.swapaxes(cases["codec/decode_codes"], 1, 2).astype(np.int32)
    wave = jax.jit(lambda m, c: m.codec.decode(c))(golden.model, given)
    near(wave, cases["codec/decoded_wave"][:, 0])


def cross_entropy(logits, labels):
    """Mean over the labels that are not -100."""
    valid = labels != -100
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.where(valid, labels, 0)[..., None], axis=-1
    )
    return -(picked[..., 0] * valid).sum() / valid.sum()


def test_backbone_loss(golden, cases):
    model = golden.model
    hidden = model.backbone.llama(jnp.asarray(cases["losses/backbone/input_embeddings"]))
    logits = model.backbone.logits(hidden)
    near(logits, cases["losses/backbone/logits"])
    loss = cross_entropy(logits[:, :-1], cases["losses/backbone/labels_c0"][:, 1:])
    np.testing.assert_allclose(loss, cases["losses/backbone/loss"], rtol=0, atol=1e-5)


def test_decoder_loss(golden, cases):
    """The reference's training forward counts positions from 0; its generation does not (see model/decoder.py)."""
    decoder_config = dataclasses.replace(golden.config.decoder, shared_first_position=False)
    model = with_config(golden.model, decoder=decoder_config)
    frames = jnp.asarray(cases["losses/decoder/frames"])
    frames = frames.reshape(-1, frames.shape[-1])
    hidden = jnp.asarray(cases["losses/decoder/backbone_hidden"]).reshape(len(frames), -1)
    logits = model.decoder(hidden, model.backbone.embed_codes(frames[:, :-1]))
    want = cases["losses/decoder/logits"]
    near(logits.reshape(*want.shape[:2], 7, -1), want[:, :, 1:8])
    loss = cross_entropy(logits, cases["losses/decoder/labels"].reshape(len(frames), -1))
    np.testing.assert_allclose(loss, cases["losses/decoder/loss"], rtol=0, atol=1e-5)


def test_step_level_functions_give_the_same(golden, cases):
    """`prefill`, then `beat` by `beat`, under a jit of one's own."""
    model = golden.model
    batch = normalize_inputs(model.cfg, inputs_of(cases, "single"))
    prompt = programs.as_prompt(batch, *programs.encode_voices(model, batch))
    state = jax.jit(beat.prefill, static_argnames=("reasoner_size", "backbone_size"))(
        model,
        prompt,
        controls([Sampling.greedy()]),
        jax.random.key(0)[None],
        jnp.asarray([8]),
        reasoner_size=256,
        backbone_size=192,
    )
    step = jax.jit(beat.beat)
    frames = []
    for _ in range(4):
        state, out = step(model, state)
        frames += [np.asarray(out.frames[0, i]) for i in range(2)]
    np.testing.assert_array_equal(np.stack(frames), cases["single/frames"][0, :8])
    assert int(state.finish[0]) == beat.Finish.LENGTH

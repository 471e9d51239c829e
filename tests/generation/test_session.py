"""The Python face on the tiny checkpoint: stream equals reply, rows equal rows alone, seeds, ends, errors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chroma_jax import Chroma, Sampling, TokenSampling, Turn, Voice
from chroma_jax.audio.batch import pack
from chroma_jax.audio.wav import load_audio
from chroma_jax.engine import programs
from chroma_jax.model.chroma import abstract_model

SAMPLING = Sampling(
    temperature=0.9,
    top_k=40,
    repetition_penalty=1.1,
    text=TokenSampling(temperature=1.2, top_p=0.95),
    codes=TokenSampling(temperature=0.7, min_p=0.02),
)


def same(a, b):
    np.testing.assert_array_equal(a.frames, b.frames)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert a.text == b.text
    assert a.finish_reason == b.finish_reason
    np.testing.assert_allclose(a.audio, b.audio, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def rows(golden, question_path, voice):
    """Three requests that differ in everything: question length and kind, voice, sampling, seed."""
    processor = golden.processor
    clip = load_audio(question_path, 24000)
    short_voice = (clip[:30001], 24000)
    questions = [
        processor.question(question_path),
        processor.question(Turn(text="What time is it?")),
        processor.question([Turn(text="Hi."), Turn(role="assistant", text="Yes?"), Turn(audio=(clip[: 24000 * 3], 24000))]),
    ]  # fmt: skip
    voices = [
        processor.voice_arrays((voice.wave, 24000), voice.text),
        processor.voice_arrays(short_voice, "had he"),
        processor.voice_arrays((clip[5000:60000], 24000), "married a more amiable woman"),
    ]
    return list(zip(questions, voices, strict=True))


def test_a_row_is_what_it_is_alone(golden, rows):
    samplings = [SAMPLING, Sampling.greedy(), dataclasses.replace(SAMPLING, temperature=1.3)]
    seeds = [5, 6, 7]
    batch = golden.generate(pack(rows), max_frames=21, sampling=samplings, seed=seeds)
    for i, row in enumerate(rows):
        alone = golden.generate(pack([row]), max_frames=21, sampling=samplings[i], seed=seeds[i])
        n, m = alone.num_frames[0], alone.num_text_tokens[0]
        assert (batch.num_frames[i], batch.num_text_tokens[i]) == (n, m)
        np.testing.assert_array_equal(batch.frames[i, :n], alone.frames[0])
        np.testing.assert_array_equal(batch.text_tokens[i, :m], alone.text_tokens[0])
        np.testing.assert_allclose(batch.audio[i], alone.audio[0], rtol=0, atol=1e-5)
        assert batch.finish_reason[i] == alone.finish_reason[0]
    assert len({f.tobytes() for f in batch.frames}) == 3


def with_ids(chroma, **ids):
    """The same weights with other special ids: how a model of random weights is made to stop."""
    config = dataclasses.replace(chroma.config, **ids)
    graphdef, _ = nnx.split(abstract_model(config))
    return Chroma(nnx.merge(graphdef, nnx.state(chroma.model)), chroma.processor)


def test_text_ends_row_by_row(golden, rows):
    plain = golden.generate(pack(rows), max_frames=16)
    # The third text token of row 1 is made the end of text: other rows meet it elsewhere or never.
    im_end = int(plain.text_tokens[1, 2])
    chroma = with_ids(golden, im_end_token_id=im_end)
    batch = chroma.generate(pack(rows), max_frames=16)
    assert batch.num_text_tokens[1] <= 3
    assert batch.text_tokens[1, batch.num_text_tokens[1] - 1] == im_end
    assert (batch.num_frames == 16).all()
    for i, row in enumerate(rows):
        alone = chroma.generate(pack([row]), max_frames=16)
        np.testing.assert_array_equal(batch.frames[i], alone.frames[0])
        assert batch.num_text_tokens[i] == alone.num_text_tokens[0]


def with_stop_at(chroma, code):
    """Weights that stop where the plain ones would choose `code` as code 0, and otherwise go the same way.

    Zero Decoder heads choose code 0 for codebooks 1..6; the last one may be anything. Then a frame is the stop frame exactly when
    its code 0 is 0, so ids 0 and `code` change places in the head and in the embedding of codebook 0.
    """
    model = chroma.model
    state = jax.tree.map(lambda x: x, nnx.state(model))
    state["decoder"]["heads"].set_value(model.decoder.heads[...].at[:-1].set(0))
    ids = np.arange(chroma.config.backbone.vocab_size)
    ids[[0, code]] = code, 0
    table = model.backbone.audio_embedding[...]
    state["backbone"]["audio_embedding"].set_value(table.at[0].set(table[0, ids]))
    state["backbone"]["head"].set_value(model.backbone.head[...][:, ids])
    return Chroma(nnx.merge(nnx.graphdef(model), state), chroma.processor)


def test_rows_stop_by_themselves_and_the_stop_frame_is_not_heard(golden, rows):
    endless = with_stop_at(golden, 0)
    batch = pack(rows)
    plain = endless.generate(batch, max_frames=16).frames
    code0 = plain[..., 0]
    assert (plain[..., 1:-1] == 0).all() and (plain[..., -1] != 0).mean() > 0.9
    # A code of row 1 in mid-reply that is not its first; rows without it go on.
    code = next(int(c) for c in code0[1, 3:] if c not in code0[1, :3])
    stops = [np.flatnonzero(row == code) for row in code0]
    chroma = with_stop_at(golden, code)
    out = chroma.generate(batch, max_frames=16)
    for i, row in enumerate(stops):
        want = int(row[0]) if len(row) else 16
        assert out.num_frames[i] == want
        assert out.finish_reason[i] == ("stop" if len(row) else "length")
        assert len(out.audio[i]) == 1920 * want
        alone = chroma.generate(pack([rows[i]]), max_frames=16)
        np.testing.assert_array_equal(alone.frames[0], out.frames[i, :want])
        np.testing.assert_array_equal(alone.audio[0].shape, out.audio[i].shape)
    assert out.finish_reason[1] == "stop"
    assert out.num_frames[1] >= 3


def test_an_empty_reply_is_a_reply(golden, rows):
    first = int(with_stop_at(golden, 0).generate(pack(rows), max_frames=16).frames[1, 0, 0])
    out = with_stop_at(golden, first).generate(pack(rows), max_frames=16)
    assert out.num_frames[1] == 0
    assert out.finish_reason[1] == "stop"
    assert out.audio[1].shape == (0,)


def test_stream_is_reply_in_pieces(golden, question_path, voice):
    request = dict(voice=voice, max_seconds=2.3, sampling=SAMPLING, seed=3)
    reply = golden.reply(question_path, **request)
    assert reply.finish_reason == "length"
    assert reply.frames.shape == (29, 8)  # 2.3 s is 28.75 frames
    assert reply.audio.shape == (29 * 1920,)
    assert reply.sample_rate == golden.sample_rate == 24000
    assert reply.seconds == pytest.approx(2.32)
    with golden.stream(question_path, **request) as stream:
        chunks = list(stream)
        assert stream.finish_reason == "length"
    assert len(chunks) == 15
    assert [len(c.frames) for c in chunks] == [2] * 14 + [1]
    assert all(len(c.audio) == 1920 * len(c.frames) for c in chunks)
    same(stream.reply(), reply)
    assert "".join(c.text for c in chunks) == reply.text


def test_same_seed_same_reply(golden, question_path, voice):
    request = dict(voice=voice, max_seconds=0.8, sampling=SAMPLING)
    first = golden.reply(question_path, seed=1, **request)
    same(golden.reply(question_path, seed=1, **request), first)
    other = golden.reply(question_path, seed=2, **request)
    assert (other.frames != first.frames).any()


def test_every_draw_is_its_own(golden, rows):
    """Of equal logits, what is drawn shows the key that it is drawn with."""
    model = golden.model
    state = jax.tree.map(lambda x: x, nnx.state(model))
    for stage, name in (("reasoner", "embedding"), ("backbone", "head"), ("decoder", "heads")):
        state[stage][name].set_value(jnp.zeros_like(state[stage][name][...]))
    if not model.cfg.reasoner.tie_embeddings:
        state["reasoner"]["head"].set_value(jnp.zeros_like(state["reasoner"]["head"][...]))
    flat = Chroma(nnx.merge(nnx.graphdef(model), state), golden.processor)
    even = Sampling(temperature=1.0, text=TokenSampling(temperature=1.0))
    out = flat.generate(pack(rows), max_frames=21, sampling=even, seed=[5, 5, 6])
    np.testing.assert_array_equal(out.frames[0], out.frames[1])  # the same seed
    codes, words = out.frames[0].reshape(-1), out.text_tokens[0, : out.num_text_tokens[0]]
    vocabulary = golden.config.backbone.vocab_size
    # As many different ones as so many draws of a uniform distribution give, and some luck.
    expected = vocabulary * (1 - (1 - 1 / vocabulary) ** len(codes))
    assert len(set(codes)) > 0.8 * expected
    assert len(set(words)) > 0.8 * len(words)
    for frame in out.frames[0]:
        assert len(set(frame)) > 4
    assert (out.frames[0] != out.frames[2]).mean() > 0.9


def test_the_word_just_spoken_is_penalised(golden, voice):
    def words(penalty):
        sampling = dataclasses.replace(SAMPLING, text=TokenSampling(repetition_penalty=penalty))
        question = Turn(text="Good night.")  # to which these weights say one word over and over
        return golden.reply(
            question, voice=voice, max_seconds=2.3, sampling=sampling
        ).tokens.tolist()

    plain, penalised = words(1.0000001), words(1e6)
    assert any(a == b for a, b in itertools.pairwise(plain)), plain
    assert len(set(penalised)) == len(penalised)


def test_every_sampling_control_reaches_its_stage(golden, question_path, voice):
    def reply(**kwargs):
        return golden.reply(question_path, voice=voice, max_seconds=1, sampling=Sampling(**kwargs))

    greedy = reply()
    hot = TokenSampling(temperature=3.0)
    text = reply(text=hot)
    assert (text.tokens != greedy.tokens).any()
    codes = reply(codes=hot)
    np.testing.assert_array_equal(codes.tokens, greedy.tokens)
    assert codes.frames[0, 0] == greedy.frames[0, 0]
    assert (codes.frames[0, 1:] != greedy.frames[0, 1:]).any()
    code0 = reply(code0=hot)
    assert (code0.frames[:, 0] != greedy.frames[:, 0]).any()
    # Narrow enough, any of them is greedy again; a strong penalty is not.
    for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0)):
        np.testing.assert_array_equal(reply(temperature=2.0, **narrow).frames, greedy.frames)
    penalised = reply(repetition_penalty=50.0)
    assert (penalised.frames != greedy.frames).any()
    for book in range(8):  # every code is new in its codebook
        assert len(set(penalised.frames[:, book])) == len(penalised.frames)


def test_close_cancels(golden, question_path, voice):
    stream = golden.stream(question_path, voice=voice, max_seconds=5)
    first = next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.finish_reason == "cancelled"
    np.testing.assert_array_equal(stream.reply().frames, first.frames)


def test_voice_is_encoded_once_and_survives_a_file(
    golden, question_path, voice_path, voice_text, tmp_path
):
    voice = Voice(voice_path, voice_text)
    codes = golden.encode_voice(voice)
    assert codes.shape == (-(-len(voice.wave) // 1920), 8)
    assert golden.encode_voice(voice) is codes
    voice.save(tmp_path / "voice.npz")
    loaded = Voice.load(tmp_path / "voice.npz")
    assert loaded.text == voice.text
    np.testing.assert_array_equal(loaded.wave, voice.wave)
    np.testing.assert_array_equal(loaded._codes[golden.engine.codec_id], codes)
    assert [p.name for p in tmp_path.iterdir()] == ["voice.npz"]
    request = dict(max_seconds=0.5)
    same(
        golden.reply(question_path, voice=loaded, **request),
        golden.reply(question_path, voice=voice, **request),
    )


def test_a_voice_serves_models_on_several_devices(golden, voice_path, voice_text):
    there = jax.devices()[1]
    elsewhere = Chroma(jax.device_put(golden.model, there), golden.processor)
    voice = Voice(voice_path, voice_text)
    caches = [chroma.prefill_voice(voice)[0] for chroma in (golden, elsewhere)]
    assert caches[1].k.devices() == {there}
    np.testing.assert_allclose(caches[0].k, caches[1].k, rtol=0, atol=1e-5)


def test_what_ends_a_stream_is_raised(golden, question_path, voice, monkeypatch):
    stream = golden.stream(question_path, voice=voice, max_seconds=5)
    next(stream)

    def broken(*args, **kwargs):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(programs, "beat", broken)
    for call in (lambda: list(stream), stream.reply, lambda: next(stream)):
        with pytest.raises(RuntimeError, match="the device is gone"):
            call()
    assert stream.finish_reason == "failed"
    stream.close()
    with pytest.raises(RuntimeError, match="the device is gone"):
        stream.reply()


def test_codes_of_another_codec_are_not_used(golden, voice_path, voice_text):
    other = Chroma.random(golden.config, seed=1)
    voice = Voice(voice_path, voice_text)
    assert (golden.encode_voice(voice) != other.encode_voice(voice)).any()


@pytest.mark.parametrize(
    "content", [b"", b"not a voice", "npz without a voice"], ids=["empty", "text", "npz"]
)
def test_foreign_voice_files_are_refused(content, tmp_path):
    path = tmp_path / "v.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="v.npz"):
        Voice.load(path)


def test_context_full_is_said(golden, question_path):
    """A voice that nearly fills the Backbone's 2048 positions leaves a short reply, which says why it is short."""
    rng = np.random.default_rng(0)
    wave = 0.1 * rng.standard_normal(1920 * 2020).astype(np.float32)
    reply = golden.reply(question_path, voice=Voice((wave, 24000), "noise"))
    assert reply.finish_reason == "context"
    # Positions: text_start, 5 bytes, text_end, 2020 frames, then beats of four (zero or frame, H, E, frame).
    assert len(reply.frames) == 2 * ((2048 - 2027) // 4)
    assert len(reply.audio) == 1920 * len(reply.frames)


def test_nothing_is_a_valid_reply(golden, rows):
    out = golden.generate(pack(rows), max_frames=0)
    assert out.frames.shape == (3, 0, 8)
    assert out.finish_reason == ["length"] * 3
    assert all(len(a) == 0 for a in out.audio)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_seconds=0), "max_seconds"),
        (dict(max_seconds=float("nan")), "max_seconds"),
        (dict(max_seconds=1000), "max_seconds 1000"),
        (dict(seed=-1), "seed"),
        (dict(seed=1.5), "seed"),
        (dict(max_seconds=float("inf")), "max_seconds must be a positive, finite number"),
        (dict(max_seconds="3"), "max_seconds must be a positive, finite number"),
        (dict(max_seconds=True), "max_seconds must be a positive, finite number"),
        (dict(max_seconds=10**400), "max_seconds 1000"),
        (dict(sampling=TokenSampling()), "sampling must be a Sampling"),
        (dict(sampling={"temperature": 1.0}), "sampling must be a Sampling"),
        (dict(system_prompt=3), "system_prompt must be text"),
        (dict(system_prompt=True), "system_prompt must be text"),
        (dict(system_prompt=["x"]), "system_prompt must be text"),
        (dict(voice=None), "voice must be a Voice"),
        (dict(voice="ref.wav"), "voice must be a Voice"),
    ],
    ids=str,
)
def test_bad_requests_are_named(golden, question_path, voice, change, message):
    for call in (golden.reply, golden.stream):
        with pytest.raises(ValueError, match=message):
            call(question_path, **{"voice": voice, **change})


def test_bad_questions_and_voices_are_named(golden, voice, tmp_path):
    with pytest.raises(ValueError, match=r"absent\.wav"):
        golden.reply(tmp_path / "absent.wav", voice=voice)
    with pytest.raises(ValueError, match="no valid tokens|neither audio nor text"):
        golden.reply(Turn(text=" "), voice=voice)
    with pytest.raises(ValueError, match="transcript"):
        Voice((np.ones(9600, np.float32) * 0.1, 24000), "  ")
    with pytest.raises(ValueError, match="transcript without audio"):
        Voice(None, "words")
    with pytest.raises(ValueError, match="NaN"):
        Voice((np.full(9600, np.nan, np.float32), 24000), "words")
    with pytest.raises(ValueError, match="context"):
        long_voice = Voice((np.full(24000 * 170, 0.1, np.float32), 24000), "words")
        golden.reply(Turn(text="hello"), voice=long_voice)
    with pytest.raises(ValueError, match="too long"):
        golden.reply(Turn(text="hello " * 1000), voice=voice)


def test_layers_apart_say_the_same(golden, golden_dir, question_path, voice):
    """The default on a CPU; the other tests of this file run stacks, the default elsewhere."""
    apart = Chroma.from_pretrained(golden_dir)
    assert isinstance(apart.model.backbone.llama.layers, nnx.List)
    assert not isinstance(golden.model.backbone.llama.layers, nnx.List)
    same(*(c.reply(question_path, voice=voice, max_seconds=2) for c in (apart, golden)))


def test_unknown_arrangement_of_layers(golden_dir):
    with pytest.raises(ValueError, match='layers must be "apart" or "stacked"'):
        Chroma.from_pretrained(golden_dir, layers="piled")

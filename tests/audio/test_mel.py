"""Log-mel features against transformers' extractor, and the cut into chunks."""

import json
from pathlib import Path

import numpy as np
import pytest

from chroma_jax.audio.mel import MelConfig, MelStream, log_mel, mel_chunks
from chroma_jax.audio.wav import AudioError, load_audio
from chroma_jax.config import tiny

DATA = Path(__file__).parents[1] / "data"
# What Qwen2.5-Omni's preprocessor_config.json says.
RELEASED = {
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "left",
    "padding_value": 0.0,
    "processor_class": "Qwen2_5OmniProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
}


def clip(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "speech":
        return load_audio(DATA / "voice_librivox_0920.wav", 16000)
    if kind == "one sample":
        return np.array([0.3], np.float32)
    if kind == "silence":
        return np.zeros(5000, np.float32)
    if kind == "click at the end":  # the loudest window may lie beyond the last valid frame
        return np.concatenate([1e-3 * rng.standard_normal(3199), [1.0]]).astype(np.float32)
    return (0.1 * rng.standard_normal(int(kind))).astype(np.float32)


@pytest.mark.parametrize(
    "kind",
    [
        "speech",
        "silence",
        "one sample",
        "click at the end",
        "159",
        "160",
        "161",
        "200",
        "201",
        "32000",
        "48001",
    ],
)
@pytest.mark.parametrize("backend", ["numpy", "installed"])
def test_equals_transformers(kind, backend, monkeypatch):
    from transformers.models.whisper import feature_extraction_whisper as whisper

    if backend == "numpy":
        monkeypatch.setattr(whisper, "is_torch_available", lambda: False)
    extractor = whisper.WhisperFeatureExtractor(feature_size=128, chunk_length=10)
    samples = clip(kind)
    out = extractor(
        samples,
        sampling_rate=16000,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="np",
    )
    want = out["input_features"][0][:, out["attention_mask"][0].astype(bool)].T
    got = log_mel(samples, MelConfig(max_seconds=10))
    assert got.dtype == np.float32
    assert got.shape == want.shape == (-(-len(samples) // 160), 128)
    np.testing.assert_allclose(got, want, atol=1e-4)
    # The padding beyond a window's reach changes nothing.
    np.testing.assert_array_equal(got, log_mel(samples))


@pytest.mark.parametrize("short", [0, 1, 40, 41, 199, 200])
def test_full_length_clip(short):
    """At the very end of the longest clip the window meets the reflected edge instead of silence."""
    from transformers import WhisperFeatureExtractor

    samples = clip(str(16000 - short))
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=1)
    out = extractor(samples, sampling_rate=16000, return_attention_mask=True, return_tensors="np")
    want = out["input_features"][0][:, out["attention_mask"][0].astype(bool)].T
    np.testing.assert_allclose(log_mel(samples, MelConfig(max_seconds=1)), want, atol=1e-4)


def test_released_settings_are_the_default():
    assert MelConfig.from_hf(RELEASED) == MelConfig()


def test_clip_too_long():
    with pytest.raises(
        AudioError, match=r"q\.wav: 1\.0 s long, the longest the model hears is 1 s"
    ):
        log_mel(np.zeros(16001, np.float32), MelConfig(max_seconds=1), name="q.wav")


@pytest.mark.parametrize("shape", [(0,), (2, 16000), ()])
def test_clip_of_wrong_shape(shape):
    with pytest.raises(AudioError, match="audio: samples must be"):
        log_mel(np.zeros(shape, np.float32))


def test_load_directory(tmp_path):
    assert MelConfig.load(tmp_path) == MelConfig()
    assert MelConfig.load(tmp_path, default=MelConfig(num_mel_bins=80)) == MelConfig(
        num_mel_bins=80
    )
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"feature_extractor": RELEASED | {"feature_size": 96}})
    )
    assert MelConfig.load(tmp_path) == MelConfig(num_mel_bins=96)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RELEASED | {"chunk_length": 30}))
    assert MelConfig.load(tmp_path) == MelConfig(max_seconds=30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[]", "must be an object"),
        ('{"feature_extractor_type": "ClapFeatureExtractor"}', "got 'ClapFeatureExtractor'"),
        ('{"dither": 0.1}', "dither must be 0"),
        ('{"padding_value": 1.0}', "padding_value must be 0"),
        ('{"hop_length": 0}', "hop_length must be a positive integer, got 0"),
        ('{"hop_length": "160"}', "hop_length must be a positive integer, got '160'"),
        ('{"hop_length": 161}', "hop_length 161 must divide"),
        ('{"sampling_rate": 8000}', "sampling_rate must be at least 16000"),
    ],
)
def test_bad_settings_name_the_file(tmp_path, text, message):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: .*{message}"):
        MelConfig.load(tmp_path)


def test_chunks():
    rng = np.random.default_rng(0)
    mels = [rng.standard_normal((m, 128)).astype(np.float32) for m in (937, 200, 73, 400)]
    chunks, lengths = mel_chunks(mels, 200)
    assert chunks.shape == (9, 200, 128)
    assert lengths.tolist() == [200, 200, 200, 200, 137, 200, 73, 200, 200]
    assert lengths.dtype == np.int32
    np.testing.assert_array_equal(
        np.concatenate([c[:n] for c, n in zip(chunks, lengths, strict=True)]), np.concatenate(mels)
    )
    assert not chunks[4, 137:].any()
    assert not chunks[6, 73:].any()


def test_no_chunks():
    chunks, lengths = mel_chunks([], 200)
    assert (len(chunks), len(lengths)) == (0, 0)


@pytest.mark.parametrize("frames", [*range(1, 12), 199, 200, 201, 202, 203, 399, 937])
def test_features_of_the_chunks_are_the_features_of_the_clip(frames):
    audio = tiny().reasoner.audio
    _, lengths = mel_chunks([np.zeros((frames, 128), np.float32)], audio.chunk_frames)
    assert sum(audio.num_features(int(n)) for n in lengths) == audio.num_features(frames)


@pytest.mark.parametrize(
    "kind", ["speech", "one sample", "click at the end", "200", "201", "48001", "full"]
)
def test_a_clip_in_pieces_gives_the_same_features(kind):
    config = MelConfig(max_seconds=10)
    samples = clip(kind) if kind != "full" else clip("159990")
    rng = np.random.default_rng(0)
    stream = MelStream(config)
    for piece in np.split(samples, np.sort(rng.integers(0, len(samples), 20))):
        stream.push(piece)
    before = stream.num_frames
    # A frame is told as soon as its window is complete.
    assert before == max(0, (len(samples) - 200) // 160 + 1) * (len(samples) > 200)
    stream.finish()
    np.testing.assert_array_equal(stream.features(0, stream.num_frames), log_mel(samples, config))


def test_features_change_only_where_the_floor_rises_above_them():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(48000).astype(np.float32)
    samples = noise * np.repeat([1e-5, 0.05, 1.0], 16000).astype(np.float32)
    stream = MelStream()
    stream.push(samples[:32000])
    early = [stream.features(i, i + 50) for i in (0, 120)]
    lowest = [stream.lowest(i, i + 50) for i in (0, 120)]
    stream.push(samples[32000:])
    stream.finish()
    late = [stream.features(i, i + 50) for i in (0, 120)]
    assert lowest[0] < stream.floor < lowest[1]
    assert (early[0] != late[0]).any()
    np.testing.assert_array_equal(early[1], late[1])


def test_a_clip_that_becomes_too_long_is_refused():
    stream = MelStream(MelConfig(max_seconds=1), name="call")
    stream.push(np.zeros(16000))
    with pytest.raises(AudioError, match="call: 1.0 s long, the longest"):
        stream.push(np.zeros(1))
    assert stream.num_samples == 16000

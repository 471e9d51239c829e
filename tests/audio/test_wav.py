"""Sound files in and out: every shape, rate and kind, every way to be broken."""

import builtins
import io
import os
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chroma_jax.audio import decode, wav
from chroma_jax.audio.wav import AudioError, AudioStream, check_output, load_audio, save_wav

DATA = Path(__file__).parents[1] / "data"
VOICE = DATA / "voice_librivox_0870.wav"


def tone(rate: int, seconds: float = 0.5, hz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)


def encoded(samples: np.ndarray, rate: int = 16000, **kwargs) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **({"format": "WAV", "subtype": "PCM_16"} | kwargs))
    return file.getvalue()


def test_native_rate_is_exact():
    want, rate = soundfile.read(VOICE, dtype="float32")
    got = load_audio(VOICE, rate)
    assert rate == 16000
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("target", [16000, 24000])
def test_resampling_keeps_the_tone(rate, target):
    got = load_audio((tone(rate), rate), target)
    assert abs(len(got) - target // 2) <= 1
    n = min(len(got), target // 2)
    # Away from the ends, where the filter sees the cut.
    error = np.abs(got[:n] - tone(target)[:n])[n // 8 : -n // 8]
    assert error.max() < 1e-3


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "file", "array", "unseekable"])
def test_sources_agree(kind):
    samples, rate = soundfile.read(VOICE, dtype="int16")

    class Pipe(io.RawIOBase):
        """Like a socket: it can only be read on."""

        def __init__(self):
            self.file = io.BytesIO(VOICE.read_bytes())

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.file.readinto(buffer)

    source = {
        "path": VOICE,
        "str": str(VOICE),
        "bytes": VOICE.read_bytes(),
        "file": io.BytesIO(VOICE.read_bytes()),
        "array": (samples, rate),
        "unseekable": Pipe(),
    }[kind]
    np.testing.assert_array_equal(load_audio(source, 16000), samples / np.float32(32768))


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 5e-5),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "FLOAT", 1e-7),
        ("WAV", "DOUBLE", 1e-7),
        ("WAV", "ULAW", 2e-2),
        ("FLAC", "PCM_16", 5e-5),
        ("OGG", "VORBIS", 5e-2),
        ("OGG", "OPUS", 1e-1),
        ("MP3", "MPEG_LAYER_III", 1e-1),
        ("AIFF", "PCM_16", 5e-5),
    ],
)
def test_formats(format, subtype, tolerance):
    want = tone(24000)
    got = load_audio(encoded(want, 24000, format=format, subtype=subtype), 24000)
    n = min(len(got), len(want)) - 2400
    assert np.abs(got[2400:n] - want[2400:n]).max() < tolerance


@pytest.mark.parametrize("layout", ["NC", "CN"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(layout, channels):
    x = np.random.default_rng(0).uniform(-1, 1, (1000, channels)).astype(np.float32)
    got = load_audio((x if layout == "NC" else x.T, 16000), 16000)
    np.testing.assert_allclose(got, x.mean(1), atol=1e-6)


def test_stereo_file_is_averaged():
    x = np.random.default_rng(0).uniform(-1, 1, (1000, 2)).astype(np.float32)
    np.testing.assert_allclose(load_audio(encoded(x, subtype="FLOAT"), 16000), x.mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "values", "want"),
    [
        (np.uint8, [0, 128, 255], [-1, 0, 127 / 128]),
        (np.int8, [-128, 0, 64], [-1, 0, 0.5]),
        (np.int16, [-32768, 0, 16384], [-1, 0, 0.5]),
        (np.int32, [-(2**31), 0, 2**30], [-1, 0, 0.5]),
        (np.float16, [-1, 0, 0.5], [-1, 0, 0.5]),
        (np.float64, [-1, 0, 0.5], [-1, 0, 0.5]),
    ],
)
def test_array_types(dtype, values, want):
    np.testing.assert_array_equal(
        load_audio((np.array(values, dtype), 16000), 16000), np.float32(want)
    )


@pytest.mark.parametrize("dtype", ["i2", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_either_byte_order(dtype, order):
    want = np.array([-0.5, 0.0, 0.25])
    scale = 1 if dtype[0] == "f" else 2 ** (8 * int(dtype[1]) - 1)
    got = load_audio(((want * scale).astype(order + dtype), 16000), 16000)
    np.testing.assert_array_equal(got, np.float32(want))


@pytest.mark.parametrize("channels", [2, 6, 8])
def test_a_single_moment_of_several_channels(channels):
    got = load_audio((np.linspace(0, 0.5, channels)[None], 16000), 16000)
    np.testing.assert_allclose(got, [0.25], rtol=1e-6)


def test_long_file_in_blocks(monkeypatch):
    monkeypatch.setattr(decode, "_BLOCK_VALUES", 1000)
    want, _ = soundfile.read(VOICE, dtype="float32")
    np.testing.assert_array_equal(load_audio(VOICE, 16000), want)


def nan_wave(value: float) -> bytes:
    x = tone(16000).astype(np.float32)
    x[100] = value
    return encoded(x, subtype="FLOAT")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "audio path ''"),
        ("no/such/file.wav", "no/such/file.wav: no such file"),
        (Path("/nowhere/q.wav"), "/nowhere/q.wav: no such file"),
        ("nul\0byte.wav", "nul"),
        (DATA, "data: is a directory"),
        (Path(__file__), r"test_wav\.py: not a sound file"),
        (b"", "audio bytes: not a sound file"),
        (b"RIFF\x00\x00\x00\x00WAVE", "audio bytes: not a sound file"),
        (encoded(np.zeros(0)), "audio bytes: has no samples"),
        (encoded(np.zeros((0, 2))), "audio bytes: has no samples"),
        (nan_wave(np.nan), "audio bytes: has NaN or infinite samples"),
        (nan_wave(-np.inf), "audio bytes: has NaN or infinite samples"),
        (encoded(np.array([1e300]), subtype="DOUBLE"), "audio bytes: has NaN or infinite samples"),
        (encoded(tone(100), 100), "sampling rate must be .* got 100"),
        (encoded(tone(1000), 10**9), "sampling rate must be .* got 1000000000"),
        ((tone(16000), 0), "sampling rate must be .* got 0"),
        ((tone(16000), -16000), "sampling rate must be .* got -16000"),
        ((tone(16000), np.nan), "sampling rate must be .* got nan"),
        ((tone(16000), 16000.5), "sampling rate must be .* got 16000.5"),
        ((tone(16000), "16000"), "sampling rate must be .* got '16000'"),
        ((tone(16000), None), "sampling rate must be .* got None"),
        ((tone(16000), True), "sampling rate must be .* got True"),
        ((16000, tone(16000)), "the other way round"),
        ((tone(16000),), r"wanted \(samples, sampling rate\), got a tuple of 1"),
        ((np.zeros(0, np.float32), 16000), "audio array: has no samples"),
        ((np.zeros((2, 0), np.float32), 16000), "audio array: has no samples"),
        ((np.float32(0.5), 16000), r"got shape \[\]"),
        ((np.zeros(()), 16000), r"got shape \[\]"),
        ((np.zeros((1, 2, 3)), 16000), r"got shape \[1, 2, 3\]"),
        ((np.array([1, 2, 3], np.int64), 16000), "got int64"),
        ((np.array([True, False]), 16000), "got bool"),
        ((np.array([1j]), 16000), "got complex128"),
        ((np.array(["a"]), 16000), "got <U1"),
        (([[1.0, 2.0], [1.0]], 16000), "samples are not an array"),
        ((np.array([0.0, np.nan]), 16000), "NaN or infinite"),
        ((np.array([0.0, 1e300]), 16000), "NaN or infinite"),
        ((np.array([0.0, 32767.0]), 16000), "float samples reach 32767, but full scale is 1"),
        ((np.zeros(2 * 3600 * 1000 + 1, np.int8), 1000), "longer than 2 hours"),
        ((np.zeros(1, np.float32), 768000), "too short, it has no samples at 16000 Hz"),
        ((np.zeros((80, 300)), 16000), r"got shape \[80, 300\]: no sound has so many channels"),
        (
            "data:audio/wav;base64," + "UklGR" * 100_000,
            "is a data: URL, not a path; pass the bytes",
        ),
        ("https://host/" + "a" * 5000 + ".wav", "is a URL, which is not fetched"),
        ("long/" * 2000 + ".wav", "no such file"),
        (3.5, "audio must be a path, bytes, an open file or .* got float"),
        (None, "audio must be a path"),
        (np.zeros(100), "audio must be a path, .* got ndarray"),
    ],
    # Encoded files hold the time of their making: as ids they would differ between workers.
    ids=lambda value: value[:80] if isinstance(value, str) else "sound",
)
def test_bad_sound_is_named(source, message):
    with pytest.raises(AudioError, match=message) as error:
        load_audio(source, 16000)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 200


def test_a_long_name_of_the_callers_is_cut():
    with pytest.raises(AudioError, match=r"^xxx.*: no such file$") as error:
        load_audio("missing.wav", 16000, name="x" * 10_000)
    assert len(str(error.value)) <= 200


def test_the_given_name_is_used():
    with pytest.raises(AudioError, match=r"^the voice: has no samples$"):
        load_audio((np.zeros(0, np.float32), 16000), 16000, name="the voice")


def test_unreadable_file(tmp_path):
    class Broken(io.RawIOBase):
        name = "upload.wav"

        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    with pytest.raises(AudioError, match=r"upload\.wav: cannot be read: Input/output error"):
        load_audio(Broken(), 16000)


def test_two_hours_are_too_long(tmp_path):
    path = tmp_path / "long.wav"
    header = bytearray(encoded(np.zeros(1), 1000, subtype="PCM_U8"))
    size = 2 * 3600 * 1000 + 1
    at = header.index(b"data") + 4
    header[4:8] = struct.pack("<I", at + size - 4)
    header[at : at + 4] = struct.pack("<I", size)
    with open(path, "wb") as f:
        f.write(header[: at + 4])
        f.truncate(at + 4 + size)
    with pytest.raises(AudioError, match=r"long\.wav: longer than 2 hours"):
        load_audio(path, 16000)


def test_a_lying_header_costs_no_memory():
    """The data chunk claims 4 GB; what is there is what comes back, or an error."""
    data = bytearray(encoded(tone(16000)))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0xFFFFFFF0)
    try:
        got = load_audio(bytes(data), 16000)
    except AudioError:
        return
    assert len(got) <= 8000


def good_wave() -> bytes:
    return encoded(tone(16000, 0.05))


@given(st.binary(max_size=400))
@settings(max_examples=150, deadline=None)
def test_fuzz_random_bytes(data):
    check_fuzzed(data)


@given(st.integers(0, len(good_wave())))
@example(44)
@settings(max_examples=60, deadline=None)
def test_fuzz_truncated(length):
    check_fuzzed(good_wave()[:length])


@given(
    st.sampled_from(["WAV", "FLAC", "OGG", "AIFF", "MP3", "AU", "CAF"]),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), min_size=1, max_size=8),
)
@example("WAV", [(22, 0)])  # no channels
@example("WAV", [(22, 255), (23, 3)])  # 1023 channels
@example("WAV", [(24, 0), (25, 0)])  # no rate
@example("WAV", [(34, 0)])  # no bits
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_fuzz_headers(format, edits):
    subtype = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(format, "PCM_16")
    data = bytearray(encoded(tone(16000, 0.05), format=format, subtype=subtype))
    for at, value in edits:
        data[at] = value
    check_fuzzed(bytes(data))


def check_fuzzed(data: bytes) -> None:
    """Sound that is usable, or an AudioError of one line."""
    try:
        got = load_audio(data, 16000)
    except AudioError as error:
        assert str(error).startswith("audio bytes: ")
        assert "\n" not in str(error)
        return
    assert got.dtype == np.float32
    assert got.ndim == 1
    assert got.size
    assert np.isfinite(got).all()


def test_save_round_trip(tmp_path):
    want = load_audio(VOICE, 16000)
    save_wav(tmp_path / "out.wav", want, 16000)
    info = soundfile.info(tmp_path / "out.wav")
    assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
    np.testing.assert_array_equal(load_audio(tmp_path / "out.wav", 16000), want)
    assert os.listdir(tmp_path) == ["out.wav"]


def test_save_float_is_exact_and_not_clipped(tmp_path):
    want = np.array([0.1, -1.5, 2.0], np.float32)
    save_wav(tmp_path / "out.wav", want, 24000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "out.wav", 24000), want)


def test_save_clips_and_rounds(tmp_path):
    save_wav(tmp_path / "out.wav", [2.0, -2.0, 1.0, 0.6 / 32768, -0.6 / 32768, 0.0], 24000)
    got, _ = soundfile.read(tmp_path / "out.wav", dtype="int16")
    assert got.tolist() == [32767, -32768, 32767, 1, -1, 0]


def test_save_empty_reply(tmp_path):
    save_wav(tmp_path / "out.wav", np.zeros(0, np.float32), 24000)
    assert soundfile.info(tmp_path / "out.wav").frames == 0


def test_save_replaces_and_keeps_the_umask(tmp_path):
    path = tmp_path / "out.wav"
    path.write_text("old")
    save_wav(path, np.zeros(10), 24000)
    assert soundfile.info(path).frames == 10
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("letter", ["n", "é"])
def test_save_under_the_longest_name(tmp_path, letter):
    """Names are limited in bytes; the name under which the file is made must not be longer."""
    name = letter * (251 // len(letter.encode())) + ".wav"
    save_wav(tmp_path / name, np.zeros(10), 24000)
    assert os.listdir(tmp_path) == [name]


def test_save_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_wav("~/out.wav", np.zeros(10), 24000)
    assert os.listdir(tmp_path) == ["out.wav"]
    assert len(load_audio("~/out.wav", 24000)) == 10


@pytest.mark.parametrize("spelled", ["same", "dots", "link", "hard", "home"])
def test_an_input_is_no_output(tmp_path, monkeypatch, spelled):
    monkeypatch.setenv("HOME", str(tmp_path))
    source = tmp_path / "voice.wav"
    save_wav(source, np.zeros(10), 24000)
    out = {
        "same": source,
        "dots": tmp_path / ".." / tmp_path.name / "voice.wav",
        "home": "~/voice.wav",
    }
    (tmp_path / "link.wav").symlink_to(source)
    os.link(source, tmp_path / "hard.wav")
    out |= {"link": tmp_path / "link.wav", "hard": tmp_path / "hard.wav"}
    with pytest.raises(AudioError, match="is one of the inputs"):
        check_output(out[spelled], inputs=[None, b"bytes", (np.zeros(1), 24000), source])
    check_output(tmp_path / "other.wav", inputs=[source])


def test_save_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "out.wav"
    path.write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wav.os, "replace", full)
    with pytest.raises(AudioError, match=r"out\.wav: cannot be written: No space left on device"):
        save_wav(path, np.zeros(10), 24000)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.wav"]


def test_save_through_a_link(tmp_path):
    (tmp_path / "real.wav").write_text("old")
    (tmp_path / "link.wav").symlink_to(tmp_path / "real.wav")
    save_wav(tmp_path / "link.wav", np.zeros(10), 24000)
    assert (tmp_path / "link.wav").is_symlink()
    assert soundfile.info(tmp_path / "real.wav").frames == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/out.wav", r"missing/out\.wav: there is no directory .*missing"),
        ("", "is not a file name"),
        ("folder", "folder: is a directory"),
        ("pipe", "pipe: is not an ordinary file"),
        ("out.mp3", r"out\.mp3: only WAV is written"),
        ("file/out.wav", "there is no directory"),
        ("n" * 300 + ".wav", "cannot be written: File name too long"),
    ],
)
def test_output_that_cannot_be_written(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("")
    os.mkfifo("pipe")
    with pytest.raises(AudioError, match=message):
        check_output(name)
    with pytest.raises(AudioError, match=message):
        save_wav(name, np.zeros(10), 24000)
    assert sorted(os.listdir()) == ["file", "folder", "pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_output_in_a_closed_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(AudioError, match="cannot be written to"):
        check_output(tmp_path / "out.wav")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([[0.0, 1.0]], r"got shape \[1, 2\]"),
        ([0.0, np.nan], "NaN or infinite"),
        ([np.inf], "NaN or infinite"),
    ],
    ids=["rank", "nan", "inf"],
)
def test_samples_that_cannot_be_saved(tmp_path, samples, message):
    with pytest.raises(AudioError, match=message):
        save_wav(tmp_path / "out.wav", np.array(samples), 24000)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_missing_package_is_named(monkeypatch, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    source = (tone(16000), 8000) if package == "soxr" else VOICE
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AudioError, match="pip install soundfile soxr"):
        load_audio(source, 16000)


def test_pcm_is_written_without_soundfile(tmp_path, monkeypatch):
    def missing():
        raise AudioError("no soundfile")

    monkeypatch.setattr(wav, "soundfile", missing)
    save_wav(tmp_path / "out.wav", np.zeros(10), 24000)
    np.testing.assert_array_equal(load_audio((np.zeros(10), 24000), 24000), np.zeros(10))


def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(AudioError, match=r"pipe\.wav: is not an ordinary file"):
        load_audio(tmp_path / "pipe.wav", 16000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "q.wav"
    path.write_bytes(VOICE.read_bytes())
    path.chmod(0)
    with pytest.raises(AudioError, match=r"q\.wav: cannot be read: Permission denied"):
        load_audio(path, 16000)


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100])
def test_a_recording_in_pieces_is_the_same(rate):
    rng = np.random.default_rng(0)
    samples = (3000 * rng.standard_normal((40000, 2))).astype(np.int16)
    stream, got = AudioStream(16000), []
    for piece in np.split(samples, np.sort(rng.integers(2, 39000, 12))):
        got.append(stream.push(piece, rate))
    got.append(stream.finish())
    np.testing.assert_array_equal(np.concatenate(got), load_audio((samples, rate), 16000))
    with pytest.raises(AudioError, match=f"the rate was {rate} Hz, and is now 11025"):
        stream.push(samples[:10], 11025)


def test_pushes_of_single_moments():
    """Stereo that comes frame by frame: 1000 of [1, 2] are 1000 samples."""
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (1000, 2)).astype(np.float32)
    stream = AudioStream(16000)
    got = np.concatenate([stream.push(moment[None], 16000) for moment in sound])
    np.testing.assert_array_equal(got, load_audio((sound, 16000), 16000))


@pytest.mark.parametrize("layout", ["NC", "CN"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_short_piece_lies_as_those_before(layout, channels):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (110, channels)).astype(np.float32)
    stream, got = AudioStream(16000), []
    for piece in np.split(sound, [100, 101, 103, 107, 108]):
        got.append(stream.push(piece if layout == "NC" else piece.T, 16000))
    np.testing.assert_allclose(np.concatenate(got), sound.mean(1), atol=1e-6)


def test_a_refused_piece_changes_nothing():
    stream = AudioStream(16000)
    with pytest.raises(AudioError, match="NaN"):
        stream.push(np.full((2, 100), np.nan), 16000)
    with pytest.raises(AudioError, match="not an array"):
        stream.push([[0.1, 0.2], [0.3]], 16000)
    assert len(stream.push(np.zeros((1, 2)), 16000)) == 1

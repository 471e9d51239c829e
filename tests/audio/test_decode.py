"""Files that lie: about their kind, their length, or how many they are. Bytes decide, and nothing is left out in silence."""

import builtins
import io
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from chroma_jax.audio import containers, decode, frames
from chroma_jax.audio.decode import AudioError, check_file
from chroma_jax.audio.wav import load_audio

SOUNDS = Path(__file__).parents[1] / "data" / "sounds"
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(24000) / 16000)).astype(np.float32)


def encoded(samples=TONE, rate=16000, format="WAV", subtype="PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def read(data: bytes) -> np.ndarray:
    return decode.read_file(data, "sound")[0]


@pytest.fixture
def warned(caplog):
    """What has been warned of."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


KINDS = {
    "wav": dict(),
    "float_wav": dict(subtype="FLOAT"),
    "rf64": dict(format="RF64"),
    "flac": dict(format="FLAC"),
    "vorbis": dict(format="OGG", subtype="VORBIS"),
    "opus": dict(format="OGG", subtype="OPUS"),
    "mp3": dict(format="MP3", subtype="MPEG_LAYER_III"),
}


# --- kinds ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["good.raw", "good.au", "good.vox", "good.mp3", "good", "good.txt"]
)
def test_a_good_file_under_another_name(tmp_path, name):
    data = (SOUNDS / "good_wav_named.raw").read_bytes()
    (tmp_path / name).write_bytes(data)
    got = load_audio(tmp_path / name, 8000)
    assert len(got) == 4000
    np.testing.assert_array_equal(got, load_audio(data, 8000))
    check_file(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["text.au", "text.vox", "text.snd", "text.gsm", "text.raw", "text.wav"]
)
def test_text_is_no_sound_under_any_name(tmp_path, name):
    data = (SOUNDS / "text_named.au").read_bytes()
    (tmp_path / name).write_bytes(data)
    for source in (tmp_path / name, data):
        with pytest.raises(AudioError, match="not a sound file that can be read"):
            load_audio(source, 16000)
    with pytest.raises(AudioError, match="not a sound file that can be read"):
        check_file(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "latin1"])
def test_text_in_any_encoding_is_no_sound(encoding):
    data = ("Not a sound, skip it. \u00ff\u00fb\n" * 400).encode(encoding, "replace")
    assert containers.lay_out(data).kind is None
    with pytest.raises(AudioError, match="not a sound file that can be read"):
        read(data)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_quick_check_walks_nothing(tmp_path, kind, monkeypatch):
    (tmp_path / "sound").write_bytes(encoded(**kind))
    monkeypatch.setattr(frames, "mp3", lambda data: pytest.fail("every frame was looked at"))
    monkeypatch.setattr(containers, "_marked", lambda *_: pytest.fail("all was searched"))
    check_file(tmp_path / "sound")
    (tmp_path / "empty").write_bytes(encoded(np.zeros(0)))
    with pytest.raises(AudioError, match="empty: has no samples"):
        check_file(tmp_path / "empty")


# --- lengths ------------------------------------------------------------------------------------------------------------------


def wav_that_says(length: int, form="RIFF", after=b"") -> bytes:
    data = bytearray(encoded(format="WAV" if form == "RIFF" else form))
    at = data.index(b"data")
    struct.pack_into("<I", data, 4, min(0xFFFFFFFF, length))
    if form == "RF64":
        struct.pack_into("<Q", data, data.index(b"ds64") + 16, length)
    else:
        struct.pack_into("<I", data, at + 4, length)
    return bytes(data) + after


def test_a_recorder_that_was_cut_off(warned):
    assert len(load_audio(SOUNDS / "wav_unfinished_header.wav", 16000)) == 8000
    assert len(load_audio((SOUNDS / "wav_unfinished_header.wav").read_bytes(), 8000)) == 4000
    assert not warned()


LENGTHS = [0, 0xFFFFFFFF, 0xFFFFFFDB, 0x7FFFFFFF, 0x7FFFF000, 0x80000000]


@pytest.mark.parametrize(
    ("length", "form"),
    [*((length, "RIFF") for length in LENGTHS), (0, "RF64"), (2**64 - 1, "RF64")],
)
def test_lengths_that_nobody_knew(length, form, warned):
    np.testing.assert_array_equal(read(wav_that_says(length, form)), read(encoded()))
    assert not warned()


def test_an_empty_recording_is_not_its_notes():
    notes = b"LIST" + struct.pack("<I", 4000) + b"INFO" + b"x" * 3996
    empty = encoded(np.zeros(0)) + notes
    with pytest.raises(AudioError, match="has no samples"):
        load_audio(empty, 16000)


@pytest.mark.parametrize("pad", [b"", b"\0"])
def test_an_odd_length_with_and_without_its_pad(pad):
    data = bytearray(encoded(np.zeros(1001), subtype="PCM_U8"))
    data = data[: data.index(b"data") + 8 + 1001] + pad + b"LIST\x04\0\0\0INFO"
    assert len(read(bytes(data) * 2)) == 2002


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (dict(), "cut off: 24.0 kB of 48.0 kB are there"),
        (dict(format="RF64"), "cut off: 24.0 kB of 48.0 kB"),
        (dict(format="AIFF"), "cut off: 24.1 kB of 48.1 kB"),
        (dict(format="AU"), "cut off: 24.0 kB of 48.0 kB"),
        (dict(format="W64"), "cut off: 24.1 kB of 48.1 kB"),
        (KINDS["mp3"], "cut off: its end, 1.0"),
        (KINDS["opus"], "cut off: it ends in the middle of a page"),
    ],
    ids=["wav", "rf64", "aiff", "au", "w64", "mp3", "opus"],
)
def test_half_a_file_is_told(kind, said, warned):
    sound = np.tile(TONE, 4) if kind.get("subtype") == "OPUS" else TONE
    whole = encoded(sound, **kind)
    headers = len(whole) - 48000 if "MPEG" not in str(kind) and "OPUS" not in str(kind) else 0
    got = read(whole[: headers + (len(whole) - headers) // 2])
    assert 0 < len(got) < 0.8 * len(sound)
    assert len(warned()) == 1
    assert warned()[0].startswith(f"sound: {said}")


def test_a_flac_file_that_is_cut(warned):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 200_000).astype(np.float32)
    whole = encoded(noise, format="FLAC")
    got = read(whole[: len(whole) * 3 // 4])
    assert 100_000 < len(got) <= 150_000
    np.testing.assert_array_equal(got, read(whole)[: len(got)])
    assert len(warned()) == 1
    assert "cannot be decoded beyond" in warned()[0] or "cut off" in warned()[0]


@pytest.mark.parametrize("told", [0, 1000, 60000])
def test_a_flac_file_of_unknown_length(told, warned):
    """As one that was written into a pipe; or a header that is wrong."""
    data = bytearray(encoded(format="FLAC"))
    data[21] &= 0xF0  # the number of samples in STREAMINFO
    data[22:26] = told.to_bytes(4, "big")
    np.testing.assert_array_equal(read(bytes(data)), read(encoded(format="FLAC")))
    assert warned() == (["sound: cut off: 1.5 of 3.8 s are there"] if told > 24000 else [])


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_mp3_of_a_changing_bit_rate_without_a_tag(rate, warned):
    """Decoders guess the length from the first frame, which here is larger than the others."""
    quiet = 1e-4 * np.random.default_rng(0).standard_normal(3 * rate)
    quiet[: rate // 10] += 0.3 * np.random.default_rng(1).uniform(-1, 1, rate // 10)
    one = encoded(quiet, rate, **KINDS["mp3"])
    got = read(frames_of(one))
    assert 3 * rate <= len(got) <= 3 * rate + 4 * 1152
    assert not warned()


def test_what_follows_the_sound_is_told(warned):
    np.testing.assert_array_equal(read(encoded() + bytes(1000)), read(encoded()))
    assert not warned()
    np.testing.assert_array_equal(read(encoded() + b"\1\2\3" * 1000), read(encoded()))
    assert warned() == ["sound: 3.0 kB after its sound are left out"]


def test_a_lost_page_is_told(warned):
    data = encoded(np.tile(TONE, 20), **KINDS["vorbis"])
    pages = data.split(b"OggS")
    data = b"OggS".join(pages[:4] + pages[5:])
    assert len(read(data))
    assert "sound: parts of it are missing, in 1 places" in warned()


# --- several in one --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_files_that_were_put_together_are_all_heard(kind, warned):
    one, other = encoded(**kind), encoded(TONE[:16000], **kind)
    want = np.concatenate([read(one), read(other), read(one)])
    assert len(want) == 64000
    np.testing.assert_array_equal(read(one + other + one), want)
    assert not warned()


def test_two_mp3_streams():
    assert len(load_audio(SOUNDS / "mp3_twice.mp3", 16000)) == 16000


def test_streams_of_two_rates(warned):
    both = encoded(TONE) + encoded(TONE, 32000)
    assert decode.read_file(both, "sound")[1] == 16000
    assert len(read(both)) == 36000
    assert not warned()


def frames_of(data: bytes) -> bytes:
    """An MP3 file without its encoder's tag."""
    return data[frames._frame(data, 0).length :]


@pytest.mark.parametrize(
    ("between", "said"),
    [
        (b"", None),
        (b"ID3\x04\0\0\0\0\x02\x00" + b"\xff\xfb\x90\x64" * 64, None),
        (b"TAG" + bytes(125), None),
        (bytes(100), None),
        (b"\xff\xfb\x12 junk" * 1000, "sound: 8.0 kB in it are no sound"),
    ],
    ids=["nothing", "id3", "id3v1", "padding", "junk"],
)
def test_mp3_streams_without_tags_of_their_encoder(between, said, warned):
    one = encoded(**KINDS["mp3"])
    got = read(one + between + frames_of(one))
    single = read(one)
    np.testing.assert_array_equal(got[: len(single)], single)
    assert len(got) >= 2 * len(single)
    assert np.abs(got[len(single) + 4000 : -4000]).max() > 0.4
    assert warned() == ([said] if said else [])


def test_a_second_stream_that_cannot_be_read_is_told(warned):
    bad = bytearray(encoded())
    bad[20] = 99  # an encoding that nobody knows
    np.testing.assert_array_equal(read(encoded() + bytes(bad)), read(encoded()))
    assert len(warned()) == 1
    assert warned()[0].startswith("sound: its stream 2 of 2 cannot be read: ")


# --- PyAV ------------------------------------------------------------------------------------------------------------------


def by_av(format: str, codec: str, rate: int) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        left = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
        both = np.stack([left, 0.5 * left]).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(both, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


MEDIA = {
    "m4a": (("ipod", "aac", 44100), containers.MP4),
    "aac": (("adts", "aac", 44100), containers.AAC),
    "webm": (("webm", "libopus", 48000), containers.WEBM),
}


@pytest.mark.parametrize(("made", "kind"), MEDIA.values(), ids=MEDIA)
def test_what_phones_and_browsers_record(made, kind, warned):
    data, rate = by_av(*made), made[-1]
    assert containers.lay_out(data).kind == kind
    got, at = decode.read_file(data, "sound")
    assert at == rate
    assert abs(len(got) - rate) < 0.05 * rate
    want = 0.375 * np.sin(2 * np.pi * 440 * np.arange(len(got)) / rate)
    middle = slice(rate // 4, rate * 3 // 4)
    spectrum = np.abs(np.fft.rfft(got[middle]))
    assert np.argmax(spectrum) == 220  # Hz, of half a second
    np.testing.assert_allclose(np.std(got[middle]), np.std(want[middle]), rtol=0.02)
    assert not warned()
    if kind != containers.AAC:
        np.testing.assert_array_equal(read(data + data), np.concatenate([got, got]))


def test_a_browsers_recording(tmp_path):
    pytest.importorskip("av")
    got = load_audio(SOUNDS / "browser.webm", 16000)
    assert 8000 <= len(got) <= 8200
    assert np.abs(got).max() > 0.1
    np.testing.assert_array_equal(got, load_audio((SOUNDS / "browser.webm").read_bytes(), 16000))
    check_file(SOUNDS / "browser.webm")


@pytest.mark.parametrize(
    "use", [lambda path: load_audio(path, 16000), check_file], ids=["load", "check"]
)
def test_without_pyav_its_extra_is_named(monkeypatch, use):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AudioError, match=r"browser\.webm: WebM/Matroska needs PyAV: ") as error:
        use(SOUNDS / "browser.webm")
    assert "pip install 'chroma_jax[media]'" in str(error.value)
    assert "ffmpeg -i FILE sound.wav" in str(error.value)
    assert len(str(error.value)) <= 200


def test_half_an_m4a_is_an_error():
    data = by_av("ipod", "aac", 44100)
    with pytest.raises(AudioError, match="Invalid data found"):
        read(data[: len(data) // 2])


def test_half_a_long_webm_is_told(warned):
    pytest.importorskip("av")
    data = bytearray((SOUNDS / "browser.webm").read_bytes())
    assert len(read(bytes(data[: len(data) // 2]))) < len(read(bytes(data)))


# --- whatever comes ------------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(
        [
            b"RIFF\0\0\0\0WAVE",
            b"RF64",
            b"OggS",
            b"fLaC",
            b"ID3",
            b"\xff\xfb\x90\x64",
            b"\0\0\0\x20ftyp",
            b"\x1aE\xdf\xa3",
        ]
    ),
    st.binary(max_size=300),
)
@settings(max_examples=150, deadline=None)
def test_fuzz_marks(mark, rest):
    """Every walk ends, within the file."""
    layout = containers.lay_out(mark + rest)
    for piece in layout.pieces:
        assert 0 <= piece.start <= piece.stop <= len(mark + rest)


@given(
    st.sampled_from(["mp3_twice.mp3", "browser.webm"]),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=20),
)
@settings(max_examples=40, deadline=None)
def test_fuzz_of_compressed_sound(name, edits):
    pytest.importorskip("av")
    data = bytearray((SOUNDS / name).read_bytes())
    for at, value in edits:
        data[at] = value
    try:
        got = load_audio(bytes(data), 16000)
    except AudioError as e:
        assert len(str(e)) <= 200
        return
    assert got.ndim == 1
    assert np.isfinite(got).all()

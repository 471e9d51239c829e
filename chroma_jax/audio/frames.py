"""Compressed sound frame by frame: how many frames an MP3 or FLAC file really has, and where one stream ends and the next begins.

Decoders take the number of samples from a tag or a header, or guess it from the first frame, and stop there. Here it is counted, and
told to them where they would not know it.

Sources: ISO/IEC 11172-3 and 13818-3 (MPEG audio), RFC 9639 (FLAC); the tags of Xing, LAME and Fraunhofer encoders.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

Data = bytes | mmap.mmap


class Piece(NamedTuple):
    """A file within the file: `head`, and the bytes from `start` to `stop`."""

    start: int
    stop: int
    head: bytes = b""


class Layout(NamedTuple):
    """What a file is."""

    kind: str | None  # WAV, MP3, Ogg, FLAC, one of FOREIGN, or None for what libsndfile may know
    pieces: list[Piece]
    problems: list[str]  # what of it cannot be heard
    samples: int = 0  # that decoding must give, where that is known, up to `slack`
    slack: int = 0


def amount(count: int) -> str:
    """Bytes, to be read."""
    return f"{count / 1e6:.1f} MB" if count >= 10**6 else f"{count / 1e3:.1f} kB"


# --- MPEG ------------------------------------------------------------------------------------------------------------------

_BITRATES = {  # kbit/s by (MPEG 1, layer)
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RESYNC = 3  # frames that follow each other where a stream is looked for
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


class _Frame(NamedTuple):
    length: int  # bytes
    samples: int
    rate: int
    side: int  # bytes between header and what would be a Xing tag


def _frame(data: Data, at: int) -> _Frame | None:
    """The MPEG audio frame whose header is here, if one is."""
    head = data[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bitrate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    first = version == 3
    kbits, rate = _BITRATES[first, layer][bitrate], _RATES[version][rate]
    padding = head[2] >> 1 & 1
    if layer == 1:
        samples, length = 384, (12000 * kbits // rate + padding) * 4
    else:
        samples = 1152 if first or layer == 2 else 576
        length = samples * 125 * kbits // rate + padding
    mono = head[3] >> 6 == 3
    return _Frame(length, samples, rate, (17 if mono else 32) if first else (9 if mono else 17))


def follow(data: Data, at: int, count: int) -> bool:
    """Whether so many frames follow each other from here on, or as many as are there up to the very end."""
    rate = None
    for _ in range(count):
        frame = _frame(data, at)
        if frame is None or rate not in (None, frame.rate):
            return False
        rate, at = frame.rate, at + frame.length
        if at == len(data):
            return True
    return True


def _frames_told(data: Data, at: int, frame: _Frame) -> int | None:
    """The number of frames by the tag of an encoder, where this frame is one: 0 where it does not tell."""
    body = data[at : at + 64]
    if body[36:40] == b"VBRI":
        return int.from_bytes(body[50:54], "big")
    for tag in (4 + frame.side, 6 + frame.side):
        if body[tag : tag + 4] in (b"Xing", b"Info"):
            return int.from_bytes(body[tag + 8 : tag + 12], "big") if body[tag + 7] & 1 else 0
    return None


class _Stream:
    """Frames that one encoder made."""

    def __init__(self, start: int):
        self.start = start
        self.frames: list[int] = []  # where they begin
        self.rate = self.samples = 0  # Hz; of a frame
        self.told: int | None = None  # by its tag, which is a frame of its own

    def sounding(self) -> int:
        return len(self.frames) - (self.told is not None)


def mp3(data: Data) -> Layout:
    """Walks all frames; each stream that an encoder made is a piece."""
    size, junk = len(data), 0
    at, streams = 0, [_Stream(0)]
    synced = True
    while at < size:
        now = streams[-1]
        tag = _tag(data, at)
        if tag:
            if now.frames:
                streams.append(_Stream(at))
            at += tag
            continue
        frame = _frame(data, at)
        expected = synced and (not now.frames or (frame is not None and frame.rate == now.rate))
        if frame is None or not (expected or follow(data, at, _RESYNC)):
            synced, before = False, at
            at = data.find(b"\xff", at + 1)
            at = size if at < 0 else at
            junk += at - before
            continue
        told = _frames_told(data, at, frame)
        lost = not synced and now.frames
        if now.frames and (told is not None or lost or frame.rate != now.rate):
            now = _Stream(at)
            streams.append(now)
        if not now.frames:
            now.told, now.rate, now.samples = told, frame.rate, frame.samples
        now.frames.append(at)
        at, synced = at + frame.length, True
    return _mp3_layout(data, [stream for stream in streams if stream.sounding() > 0], junk)


def _mp3_layout(data: Data, streams: list[_Stream], junk: int) -> Layout:
    pieces, missing, samples = [], 0, 0
    for i, stream in enumerate(streams):
        stop = streams[i + 1].start if i + 1 < len(streams) else len(data)
        count = stream.sounding()
        missing += (stream.told or 0) - count
        if not stream.told:
            pieces.append(Piece(stream.frames[0], stop, _tag_frame(data, stream.frames[0], count)))
        elif count > stream.told + 3:  # another stream without a tag of its own
            cut = stream.frames[stream.told + 1]
            head = _tag_frame(data, cut, count - stream.told)
            pieces += [Piece(stream.start, cut), Piece(cut, stop, head)]
        else:
            pieces.append(Piece(stream.start, stop))
        samples += count * stream.samples
    problems = []
    if missing > 3 and any(stream.told for stream in streams):
        seconds = missing * streams[0].samples / streams[0].rate
        problems.append(f"cut off: its end, {seconds:.1f} s, is missing")
    if len(streams) > 1 and junk > 1024:
        problems.append(f"{amount(junk)} in it are no sound")
    # What encoders put before and after the sound, a few frames, is not heard.
    slack = sum(4 * stream.samples for stream in streams)
    return Layout("MP3", pieces, problems, samples, slack)


def _tag_frame(data: Data, at: int, count: int) -> bytes:
    """A frame as encoders put it before the others, with their number: without one, decoders guess it from the first bit rate."""
    head = bytearray(data[at : at + 4])
    head[1] |= 1  # without a checksum
    for bitrate in range(1, 15):
        head[2] = bitrate << 4 | head[2] & 0x0C
        frame = _frame(bytes(head), 0)
        if frame.length >= 200:
            break
    if head[1] >> 1 & 3 != 1:  # layers I and II have no such tags
        return b""
    tag = b"Xing" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return bytes(head) + (bytes(frame.side) + tag).ljust(frame.length - 4, b"\0")


def after_tags(data: Data, at: int) -> int:
    """Where the tags that are here end."""
    while tag := _tag(data, at):
        at += tag
    return at


def _tag(data: Data, at: int) -> int:
    """Bytes of the ID3 or APE tag that is here."""
    mark = data[at : at + 8]
    if mark[:3] == b"ID3" and len(mark) == 8:
        length = 0
        for byte in data[at + 6 : at + 10]:
            length = length << 7 | byte & 0x7F
        return 10 + length + (10 if data[at + 5] & 0x10 else 0)
    if mark == b"APETAGEX":
        return 32 + int.from_bytes(data[at + 12 : at + 16], "little")
    return 128 if mark[:3] == b"TAG" else 0


def is_adts(data: Data, at: int) -> bool:
    """Whether two AAC frames follow each other."""
    for _ in range(2):
        head = data[at : at + 6]
        if len(head) < 6 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
            return False
        length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        if length < 7:
            return False
        at += length
    return True


# --- FLAC -----------------------------------------------------------------------------------------------------------------


def flac(data: Data, pieces: list[Piece]) -> Layout:
    """Streams whose number of samples is what their last frames say."""
    told = [_flac_piece(data, piece) for piece in pieces]
    return Layout("FLAC", [piece for piece, _ in told], [problem for _, problem in told if problem])


def _flac_piece(data: Data, piece: Piece) -> tuple[Piece, str]:
    begin = data.find(b"fLaC", piece.start, piece.stop)
    last = _last_frame(data, begin, piece.stop)
    if last is None:
        return piece, ""
    at, start, end = last
    told = (data[begin + 21] & 15) << 32 | int.from_bytes(data[begin + 22 : begin + 26], "big")
    if told == end:
        return piece, ""
    if _crc16(data[at : piece.stop]):  # of what is whole, it is zero
        end = start
    head = bytearray(data[piece.start : begin + 26])
    head[-5] = head[-5] & 0xF0 | end >> 32
    head[-4:] = (end & 0xFFFFFFFF).to_bytes(4, "big")
    rate = int.from_bytes(data[begin + 18 : begin + 21], "big") >> 4
    problem = f"cut off: {end / rate:.1f} of {told / rate:.1f} s are there" if told > end else ""
    return Piece(begin + 26, piece.stop, bytes(head)), problem


def _last_frame(data: Data, begin: int, stop: int) -> tuple[int, int, int] | None:
    """Where the last frame is, and its first sample and the one after its last."""
    block = int.from_bytes(data[begin + 8 : begin + 10], "big")
    at = stop
    while (at := data.rfind(b"\xff", begin + 42, at)) >= 0:
        head = data[at : at + 16]
        if len(head) < 6 or head[1] & 0xFE != 0xF8 or head[3] & 1:
            continue
        number, used = _coded_number(head, 4)
        size = head[2] >> 4
        extra = {6: 1, 7: 2}.get(size, 0)
        end = used + extra + {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
        if number is None or size == 0 or end >= len(head) or _crc8(head[:end]) != head[end]:
            continue
        if extra:
            samples = int.from_bytes(head[used : used + extra], "big") + 1
        else:
            samples = 192 if size == 1 else 576 << size - 2 if size < 6 else 256 << size - 8
        first = number if head[1] & 1 else number * block
        return at, first, first + samples
    return None


def _coded_number(head: bytes, at: int) -> tuple[int | None, int]:
    """A number coded as UTF-8 codes letters, and where it ends."""
    lead = head[at]
    length = 1 if lead < 0x80 else 8 - (lead ^ 0xFF).bit_length()
    if lead >= 0x80 and not 2 <= length <= 7:
        return None, at
    number = lead if length == 1 else lead & (0x7F >> length)
    for byte in head[at + 1 : at + length]:
        number = number << 6 | byte & 0x3F
    return number, at + length


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ (0x107 if crc & 0x80 else 0)) & 0x1FF
    return crc


def _crc16(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = crc << 1 ^ (0x18005 if crc & 0x8000 else 0)
    return crc

"""Where the sound of a file lies: told by its bytes, never by its name, and as far as the file really goes.

Decoders believe headers and stop where the first stream ends. Here files are walked from chunk to chunk (WAV), page to page (Ogg), box to
box (MP4) or frame to frame (MP3, FLAC: `audio.frames`): a header that was never finished gets the length that is there, streams that were
put one after the other become pieces, each a file of its own, and what nobody can hear is said.

Sources: RIFF/WAVE and RF64 (EBU Tech 3306), RFC 3533 (Ogg), ISO/IEC 14496-12 (boxes).
"""

from __future__ import annotations

import re
import struct

from chroma_jax.audio import frames
from chroma_jax.audio.frames import Data, Layout, Piece, amount

# Kinds that libsndfile does not read.
MP4, WEBM, AAC = "M4A/MP4", "WebM/Matroska", "AAC"
FOREIGN = (MP4, WEBM, AAC, "AMR", "WMA", "AVI", "FLV", "WavPack")
# How their files begin, also the second one of two that were put together.
_FOREIGN_MARKS = {
    WEBM: rb"\x1aE\xdf\xa3(?=.{0,64}?(?:webm|matroska))",
    "AMR": rb"#!AMR(?:-WB)?\n",
    "WMA": rb"0&\xb2u\x8ef\xcf\x11",
    "FLV": rb"FLV\x01[\x01\x04\x05]\x00\x00\x00\x09",
    "WavPack": rb"\Awvpk",
}
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"skip", b"free", b"pnot")
# From here on, the length of a chunk is what programs write who cannot know it: SoX, espeak, ffmpeg, arecord.
_ENDLESS = 0x7FFFF000
_LARGEST = 0xFFFFFF00  # of a RIFF file that is to be read as one


def lay_out(data: Data, *, beginning: bool = False) -> Layout:
    """What a file is, and where its sound lies. `None` as kind says nothing about whether there is any.

    With `beginning` compressed files are not walked: one piece, from which what the file is can be told.
    """
    head, whole = bytes(data[:16]), [Piece(0, len(data))]
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _wav(data)
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return Layout("AVI", whole, [])
    if head[:4] == b"OggS":
        return Layout("Ogg", whole, []) if beginning else _ogg(data)
    if head[4:8] in _MP4_BOXES and int.from_bytes(head[:4], "big") <= len(data):
        return _mp4(data)
    for kind, mark in _FOREIGN_MARKS.items():
        if re.match(mark, data, re.DOTALL):
            return Layout(kind, whole if beginning else _marked(data, mark), [])
    at = frames.after_tags(data, 0)
    if data[at : at + 4] == b"fLaC" and not beginning:
        # The mark and the head of what must follow: no sound looks like that by chance.
        return frames.flac(data, _marked(data, rb"fLaC[\x00\x80]\x00\x00\x22", at))
    if frames.is_adts(data, at):
        return Layout(AAC, whole, [])
    if frames.follow(data, at, 2) and not beginning:
        return frames.mp3(data)
    told, problems = _told_length(data), []
    if len(data) < told < _ENDLESS:
        problems.append(f"cut off: {amount(len(data))} of {amount(told)} are there")
    return Layout(None, whole, problems)


def _told_length(data: Data) -> int:
    """The length of an AIFF, AU or Wave64 file by its header; 0 for others."""
    head = data[:24]
    if len(head) == 24 and head[:4] == b"FORM":
        return 8 + int.from_bytes(head[4:8], "big")
    if len(head) == 24 and head[:4] == b".snd":
        return int.from_bytes(head[4:8], "big") + int.from_bytes(head[8:12], "big")
    if len(head) == 24 and head[:4] == b"riff":
        return int.from_bytes(head[16:24], "little")
    return 0


# --- WAV ------------------------------------------------------------------------------------------------------------------


def _wav(data: Data) -> Layout:
    pieces, problems, at, size = [], [], 0, len(data)
    while at < size:
        if data[at : at + 4] not in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
            rest = bytes(data[at : at + (1 << 16)])
            if rest.strip(b"\0"):
                problems.append(f"{amount(size - at)} after its sound are left out")
            break
        piece, at = _wav_piece(data, at, problems)
        pieces.append(piece)
    return Layout("WAV", pieces, problems)


def _wav_piece(data: Data, begin: int, problems: list[str]) -> tuple[Piece, int]:
    """One RIFF file, and where it ends."""
    order = ">" if data[begin : begin + 4] == b"RIFX" else "<"
    at, size, long_size = begin + 12, len(data), None
    head, start, found = b"", begin, False
    while at + 8 <= size and (_is_chunk(data, at, order) or data[at : at + 4] == b"data"):
        name = data[at : at + 4]
        (length,) = struct.unpack(order + "I", data[at + 4 : at + 8])
        if name == b"ds64" and length >= 16:
            (long_size,) = struct.unpack("<Q", data[at + 16 : at + 24])
        if name in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
            break
        if name == b"data" and not found:
            found, long = True, length == 0xFFFFFFFF and long_size is not None
            told = long_size if long else length
            length, there = told, size - at - 8
            if told > there or (told == 0 and not _chunks_to_the_end(data, at + 8, order)):
                if 0 < told < (1 << 62 if long else _ENDLESS):
                    problems.append(f"cut off: {amount(there)} of {amount(told)} are there")
                if there > _LARGEST:
                    problems.append(f"only its first {amount(_LARGEST)} are read")
                length = there
                start = at + 8
                head = _wav_head(data, begin, start, order, min(there, _LARGEST))
        at += 8 + length
        # A length that is odd is followed by a byte more, which some leave out.
        if length % 2 and not _is_chunk(data, at, order):
            at += 1
    at = min(at, size)
    return Piece(start, at, head), at


def _wav_head(data: Data, begin: int, stop: int, order: str, sound: int) -> bytes:
    """The bytes up to the sound with its true length, as those of a plain RIFF file."""
    head = bytearray(data[begin:stop])
    if order == "<":
        head[:4] = b"RIFF"
    at = head.find(b"ds64", 12, 20)
    if at >= 0:
        head[at : at + 4] = b"JUNK"
    struct.pack_into(order + "I", head, 4, len(head) - 8 + sound)
    struct.pack_into(order + "I", head, len(head) - 4, sound)
    return bytes(head)


def _is_chunk(data: Data, at: int, order: str) -> bool:
    """Whether a chunk begins here that ends within the file."""
    head = bytes(data[at : at + 8])
    if len(head) < 8 or not all(32 <= letter < 127 for letter in head[:4]):
        return False
    (length,) = struct.unpack(order + "I", head[4:])
    return at + 8 + length <= len(data)


def _chunks_to_the_end(data: Data, at: int, order: str) -> bool:
    """Whether from here on there is nothing but whole chunks."""
    while at < len(data):
        if not _is_chunk(data, at, order):
            return False
        (length,) = struct.unpack(order + "I", data[at + 4 : at + 8])
        at += 8 + length + length % 2
    return True


# --- Ogg, MP4, ... ------------------------------------------------------------------------------------------------------------


def _ogg(data: Data) -> Layout:
    starts, problems, at, size = [0], [], 0, len(data)
    pages: dict[bytes, int] = {}  # number of the last one, by stream
    beginning, lost, cut = True, 0, False
    while at < size:
        head = data[at : at + 27]
        if head[:4] != b"OggS" or len(head) < 27:
            found = data.find(b"OggS", at + 1)
            lost += found >= 0
            at = size if found < 0 else found
            continue
        first, serial = bool(head[5] & 2), bytes(head[14:18])
        number = int.from_bytes(head[18:22], "little")
        if first and not beginning:
            starts.append(at)
            pages = {}
        lost += not first and number != pages.get(serial, number - 1) + 1
        pages[serial], beginning = number, first
        at += 27 + head[26] + sum(data[at + 27 : at + 27 + head[26]])
        cut = at > size
    if cut:
        problems.append("cut off: it ends in the middle of a page")
    if lost:
        problems.append(f"parts of it are missing, in {lost} places")
    return Layout("Ogg", _split(starts, size), problems)


def _marked(data: Data, mark: bytes, begin: int = 0) -> list[Piece]:
    """Pieces that begin with the mark; the first begins where the data does."""
    found = [match.start() for match in re.finditer(mark, data, re.DOTALL)]
    return _split([0, *(at for at in found if at > begin)], len(data))


def _mp4(data: Data) -> Layout:
    starts, at, size = [0], 0, len(data)
    while at + 8 <= size:
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"ftyp" and at:
            starts.append(at)
        if length == 1:
            length = int.from_bytes(data[at + 8 : at + 16], "big")
        if length < 8:  # 0: up to the end
            break
        at += length
    return Layout(MP4, _split(starts, size), [])


def _split(starts: list[int], size: int) -> list[Piece]:
    return [Piece(*ends) for ends in zip(starts, [*starts[1:], size], strict=True)]

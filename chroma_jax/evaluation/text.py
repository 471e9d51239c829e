"""Texts for a word error rate: normalised, compared, counted."""

from __future__ import annotations

import functools
import string
from typing import NamedTuple

# The marks that zhon.hanzi.punctuation lists, the Chinese half of what Seed-TTS-eval deletes.
_CHINESE_MARKS = (
    "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』【】〔〕〖〗〘〙〚〛"
    "〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏﹑﹔·．！？｡。"
)
_DELETED = str.maketrans("", "", string.punctuation.replace("'", "") + _CHINESE_MARKS)
CHARACTER_LANGUAGES = ("zh",)  # their errors are counted in characters


class Errors(NamedTuple):
    """Of one utterance. The rate may exceed 1: insertions count."""

    substitutions: int
    deletions: int
    insertions: int
    words: int  # of the reference

    @property
    def count(self) -> int:
        """All errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors for each word of the reference."""
        return self.count / self.words


def seed_tts(text: str, language: str = "en") -> str:
    """Seed-TTS-eval's: ASCII and Chinese marks vanish, but for the apostrophe; English in lower case, Chinese by characters.

    A hyphen vanishes too, so that its words fuse. Numbers and spelling variants stay as they are.
    """
    text = text.translate(_DELETED).replace("  ", " ")
    if language in CHARACTER_LANGUAGES:
        return " ".join(text.replace(" ", ""))
    return text.lower()


@functools.cache
def _english():
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError as e:
        raise ValueError(
            "Whisper's English normaliser is missing: pip install whisper-normalizer (in chroma_jax[evaluate])"
        ) from e
    return EnglishTextNormalizer()


def whisper_english(text: str) -> str:
    """Whisper's English normaliser: numbers as figures, contractions and British spellings rewritten, fillers dropped."""
    return _english()(text).strip()


def errors(reference: str, hypothesis: str) -> Errors:
    """Least edits of words between two texts that are normalised already. Raises ValueError for a reference without words."""
    if not reference.split():
        raise ValueError("a word error rate needs a reference with words")
    try:
        import jiwer
    except ImportError as e:
        raise ValueError(
            "counting word errors needs jiwer: pip install jiwer (in chroma_jax[evaluate])"
        ) from e
    found = jiwer.process_words(" ".join(reference.split()), " ".join(hypothesis.split()))
    return Errors(found.substitutions, found.deletions, found.insertions, len(reference.split()))


def missing_at_end(reference: str, hypothesis: str) -> int:
    """Words of the reference after the last one that the hypothesis has in its place: speech cut before its end."""
    import jiwer

    words = reference.split()
    if not hypothesis.split():
        return len(words)
    chunks = jiwer.process_words(" ".join(words), " ".join(hypothesis.split())).alignments[0]
    deleted = 0
    for chunk in reversed(chunks):
        if chunk.type == "delete":
            deleted += chunk.ref_end_idx - chunk.ref_start_idx
        elif chunk.type != "insert":
            break
    return deleted

"""Text <-> token ids: the checkpoint's byte-level BPE, or a plain byte tokenizer for checkpoints without one.

What a user types never becomes a control token: ordinary text is encoded by the bare BPE model, and control tokens come
from templates only.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from chroma_jax import paths
from chroma_jax.config import ChromaConfig
from chroma_jax.messages import shown

if TYPE_CHECKING:
    import tokenizers

# What a checkpoint directory may hold of the tokenizer and the processor; a converter copies those that are there.
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)

IM_START = "<|im_start|>"


class Tokenizer:
    """A byte-level BPE model and the table of control tokens beside it.

    `model` is a `tokenizers.Tokenizer` whose normalizer, pre-tokenizer and BPE model are used; `added` maps the tokens beside the
    model to their ids, `special` holds the ids among them that are control, not text. Raises ValueError for a model that is not byte-level.
    """

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        added: Mapping[str, int],
        special: Iterable[int],
        *,
        chat_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
        name: str = "tokenizer",
    ):
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders

        if not isinstance(model.decoder, decoders.ByteLevel):
            raise ValueError(
                f"{name}: only byte-level BPE is supported, its decoder is {shown(model.decoder)}"
            )
        # The bare model: no added tokens, so no text can reach their ids; no post-processor, padding or truncation.
        self._model = Backend(model.model)
        if model.normalizer is not None:
            self._model.normalizer = model.normalizer
        if model.pre_tokenizer is not None:
            self._model.pre_tokenizer = model.pre_tokenizer
        self._added = dict(added)
        self._added_text = {i: token for token, i in added.items()}
        self._special = frozenset(special)
        longest_first = sorted(self._added, key=len, reverse=True)
        self._added_pattern = re.compile("|".join(map(re.escape, longest_first))) if added else None
        self._pieces: dict[int, bytes] = {}
        self.chat_template = chat_template
        self.template_tokens = dict(template_tokens or {})
        self.name = name

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. Only with `allow_special` do strings such as <|im_end|> become the control tokens they name."""
        segments = self.split_special(text) if allow_special else [text]
        return self.encode_segments(segments)

    def encode_segments(self, segments: Iterable[int | str]) -> list[int]:
        """Token ids of a mix of control tokens (ids, kept) and ordinary text (strings; neighbours are joined first)."""
        ids: list[int] = []
        text = ""
        for segment in [*segments, None]:
            if isinstance(segment, str):
                text += segment
                continue
            if text:
                # Half of a surrogate pair is no character; it would stop the encoder.
                clean = text.encode("utf-8", "replace").decode("utf-8")
                ids += self._model.encode(clean, add_special_tokens=False).ids
                text = ""
            if segment is not None:
                ids.append(int(segment))
        return ids

    def split_special(self, text: str) -> list[int | str]:
        """`text` cut at the tokens that stand beside the model: their ids, and the text between them."""
        segments: list[int | str] = []
        at = 0
        for match in self._added_pattern.finditer(text) if self._added_pattern else ():
            if match.start() > at:
                segments.append(text[at : match.start()])
            segments.append(self._added[match.group()])
            at = match.end()
        if at < len(text):
            segments.append(text[at:])
        return segments

    def token_id(self, token: str) -> int | None:
        """Id of a control token such as <|im_start|>, or None."""
        return self._added.get(token)

    def token(self, token_id: int) -> str | None:
        """The control token of an id, or None."""
        return self._added_text.get(token_id)

    def piece(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for; nothing for control tokens and ids without a token."""
        token_id = int(token_id)
        if token_id not in self._pieces:
            self._pieces[token_id] = self._read_piece(token_id)
        return self._pieces[token_id]

    def _read_piece(self, token_id: int) -> bytes:
        if token_id in self._special or token_id < 0:
            return b""
        if token_id in self._added_text:
            return self._added_text[token_id].encode()
        token = self._model.id_to_token(token_id) or ""
        # A character outside the byte alphabet can only come from an entry that the model itself cannot make.
        return b"".join(_BYTE_OF.get(c, c.encode("utf-8", "replace")) for c in token)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids, without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)


class StreamDecoder:
    """Text as its tokens arrive. A character is held back until all its bytes are there.

    The concatenation of all `push` results and `finish` equals `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: ArrayLike) -> str:
        """The text that one further id, or a sequence of them, completes; possibly empty."""
        ids = np.ravel(np.asarray(ids, np.int64)).tolist()
        return self._utf8.decode(b"".join(map(self._tokenizer.piece, ids)))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became complete."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint directory: tokenizer.json, or Qwen2's vocab.json and merges.txt; with the tokens
    of tokenizer_config.json and the chat template of chat_template.jinja, tokenizer_config.json or chat_template.json.

    Raises ValueError naming the directory or file for a directory without a tokenizer and for files that cannot be read.
    """
    directory = paths.expand(directory)
    tokenizer_json = os.path.join(directory, "tokenizer.json")
    bpe_files = [os.path.join(directory, f) for f in ("vocab.json", "merges.txt")]
    settings = _read_json(os.path.join(directory, "tokenizer_config.json"))
    if os.path.isfile(tokenizer_json):
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_file(tokenizer_json)
        except Exception as e:  # the Rust side raises bare Exception
            raise ValueError(f"{tokenizer_json} is not a tokenizer: {e}") from e
    elif all(map(os.path.isfile, bpe_files)):
        kind = settings.get("tokenizer_class", "Qwen2Tokenizer")
        if kind not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
            raise ValueError(
                f"{directory}: tokenizer_class must be Qwen2Tokenizer where there is no tokenizer.json, got {shown(kind)}"
            )
        try:
            backend = _qwen2(*bpe_files, settings)
        except Exception as e:  # the Rust side raises bare Exception
            raise ValueError(
                f"{directory}: vocab.json and merges.txt are not a tokenizer: {e}"
            ) from e
    else:
        raise ValueError(
            f"{directory} has no tokenizer: wanted tokenizer.json, or vocab.json and merges.txt"
        )
    added, special = _added_tokens(backend, settings, directory)
    return Tokenizer(
        backend,
        added,
        special,
        chat_template=_chat_template(directory, settings),
        template_tokens=_template_tokens(settings),
        name=directory,
    )


# How Qwen2 cuts text before it merges bytes: contractions, words, single digits, punctuation, line ends, spaces.
_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen2(vocab: str, merges: str, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer from its two files; control tokens that tokenizer_config.json does not number come behind the vocabulary."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE.from_file(vocab, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if not settings.get("added_tokens_decoder"):
        named = [*_template_tokens(settings).values(), "<|endoftext|>"]
        named += [t for t in settings.get("additional_special_tokens") or () if isinstance(t, str)]
        backend.add_special_tokens(list(dict.fromkeys(named)))
    return backend


def has_tokenizer(directory: str | os.PathLike) -> bool:
    """Whether `load_tokenizer` would find files to read."""
    directory = paths.expand(directory)
    there = {f for f in PROCESSOR_FILES if os.path.isfile(os.path.join(directory, f))}
    return "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there


def tiny_tokenizer(config: ChromaConfig) -> Tokenizer:
    """A tokenizer of 256 bytes and the control tokens of `config`, for checkpoints that bring none.

    Bytes stand at the first 256 ids that no control token takes (0..255 as a rule), <|im_start|> at the next. All
    other ids decode to nothing. Raises ValueError when the vocabulary is too small for that.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    reasoner = config.reasoner
    added = {
        "<|endoftext|>": reasoner.pad_token_id,
        "<|im_end|>": config.im_end_token_id,
        "<|AUDIO|>": reasoner.audio_token_id,
        "<|audio_bos|>": reasoner.audio_start_token_id,
        "<|audio_eos|>": reasoner.audio_end_token_id,
        "<|text_start|>": config.text_start_token_id,
        "<|text_end|>": config.text_end_token_id,
    }
    taken = set(added.values())
    free = [i for i in range(min(reasoner.vocab_size, 257 + len(taken))) if i not in taken]
    if len(free) < 257:
        raise ValueError(
            f"vocab_size {reasoner.vocab_size} is too small for a byte tokenizer: wanted 257 ids beside "
            f"the {len(taken)} special ones"
        )
    added[IM_START] = free[256]
    vocab = {char: free[byte[0]] for char, byte in _BYTE_OF.items()}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, added, added.values(), name="byte tokenizer")


def _byte_alphabet() -> dict[str, bytes]:
    """Byte-level BPE writes each byte as one printable character: Latin-1's own where it is printable, else one from
    U+0100 on, in order."""
    alphabet, spare = {}, 0x100
    for byte in range(256):
        # Soft hyphen (0xAD) and the two spaces are what Latin-1 prints as nothing.
        printable = 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD)
        alphabet[chr(byte if printable else spare)] = bytes([byte])
        spare += not printable
    return alphabet


_BYTE_OF = _byte_alphabet()


def _read_json(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            values = json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    return values


def _added_tokens(
    backend, settings: Mapping[str, Any], directory: str
) -> tuple[dict[str, int], set[int]]:
    """Tokens beside the model, of the tokenizer file and of tokenizer_config.json, and which of them are control."""
    texts: dict[int, str] = {}
    special: set[int] = set()
    for token_id, token in backend.get_added_tokens_decoder().items():
        texts[token_id] = token.content
        if token.special:
            special.add(token_id)
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise ValueError(
            f"{directory}/tokenizer_config.json: added_tokens_decoder must be an object, got {type(listed).__name__}"
        )
    for key, token in listed.items():
        try:
            token_id, text = int(key), token["content"]
        except (TypeError, ValueError, KeyError) as e:
            raise ValueError(
                f"{directory}/tokenizer_config.json: added_tokens_decoder entry {shown(key)} is malformed"
            ) from e
        if texts.setdefault(token_id, text) != text:
            raise ValueError(
                f"{directory}: token {token_id} is {shown(texts[token_id])} in the tokenizer but {shown(text)} in tokenizer_config.json"
            )
        if token.get("special"):
            special.add(token_id)
    return {text: token_id for token_id, text in texts.items() if text}, special


def _chat_template(directory: str, settings: Mapping[str, Any]) -> str | None:
    """The checkpoint's own template. A file of its own wins over the tokenizer's settings, as in transformers."""
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as f:
                return f.read()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} cannot be read: {e}") from e
    found = settings.get("chat_template") or _read_json(
        os.path.join(directory, "chat_template.json")
    ).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {
            entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)
        }
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{directory}: chat_template must be text, got {type(found).__name__}")
    return found


def _template_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... which templates may use."""
    tokens = {}
    for key, value in settings.items():
        if key.endswith("_token"):
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[key] = value
    return tokens

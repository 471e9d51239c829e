"""Conversations as users write them -> control tokens and text in the checkpoint's chat format."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chroma_jax.audio.tokenizer import IM_START, Tokenizer
from chroma_jax.audio.wav import AudioError, AudioSource
from chroma_jax.config import ChromaConfig
from chroma_jax.messages import shown

ROLES = ("system", "user", "assistant")
# Bare arrays in a message carry no rate; the chat format of the Hub takes them to be at the rate the model hears.
BARE_ARRAY_RATE = 16000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation. A user turn has audio, text or both (the audio first); the others have text."""

    role: str = "user"
    text: str | None = None
    audio: AudioSource | None = None


@dataclasses.dataclass(frozen=True)
class Audio:
    """Sound inside a message, and what errors call it."""

    source: AudioSource
    name: str


@dataclasses.dataclass(frozen=True)
class Message:
    """A checked turn: its parts in order, text or sound."""

    role: str
    parts: tuple[str | Audio, ...]

    @property
    def audios(self) -> list[Audio]:
        """The sounds of the message, in order."""
        return [part for part in self.parts if isinstance(part, Audio)]


# A path, encoded bytes or (samples, rate) is a spoken question; a list is a conversation of turns, or of dictionaries
# {"role": ..., "content": text or [{"type": "text", "text": ...}, {"type": "audio", "audio": ...}]}.
Conversation = AudioSource | Turn | Mapping[str, Any] | Sequence[Turn | Mapping[str, Any]]


def read_conversation(turns: Conversation, system_prompt: str | None) -> list[Message]:
    """Checks a conversation and puts `system_prompt` in front, unless it is empty or the conversation has its own.

    A bare string is the path of a spoken question, never its text: text is Turn(text=...). Raises ValueError naming the
    turn for an unknown role or content, for sound outside user turns, and for an order that leaves nothing to answer.
    """
    if isinstance(turns, Turn | Mapping):
        turns = [turns]
    elif not isinstance(turns, list | tuple):
        turns = [Turn(audio=turns)]
    elif any(isinstance(item, int | float | np.number) for item in turns):  # (samples, rate)
        turns = [Turn(audio=tuple(turns))]
    messages = [_read_turn(turn, f"turn {i}") for i, turn in enumerate(turns)]
    if not messages:
        raise ValueError("the conversation has no turns")
    for i, message in enumerate(messages):
        if message.role == "system" and i > 0:
            raise ValueError(f"turn {i}: a system turn can only be the first")
    if messages[-1].role != "user":
        raise ValueError(f"the last turn must be the user's, got {shown(messages[-1].role)}")
    if messages[0].role != "system" and system_prompt:
        messages.insert(0, Message("system", (system_prompt,)))
    return messages


def _read_turn(turn: object, where: str) -> Message:
    if isinstance(turn, Turn):
        role, parts = turn.role, []
        if turn.audio is not None:
            parts.append(_audio(turn.audio, where))
        if turn.text is not None:
            parts.append(turn.text)
    elif isinstance(turn, Mapping):
        role, content = turn.get("role"), turn.get("content")
        unknown = sorted(set(map(str, turn)) - {"role", "content"})
        if unknown:
            raise ValueError(f"{where}: unknown keys {unknown}; wanted role and content")
        if isinstance(content, str):
            parts = [content]
        elif isinstance(content, list | tuple):
            parts = [_read_part(part, f"{where}, part {i}") for i, part in enumerate(content)]
        else:
            raise ValueError(
                f"{where}: content must be text or a list of parts, got {type(content).__name__}"
            )
    else:
        raise ValueError(
            f"{where} must be a Turn or a dictionary with role and content, got {type(turn).__name__}"
        )
    if role not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, got {shown(role)}")
    for part in parts:
        if isinstance(part, Audio):
            if role != "user":
                raise ValueError(
                    f"{where}: only user turns can hold audio, this one is {shown(role)}"
                )
        elif not isinstance(part, str):
            raise ValueError(f"{where}: text must be a string, got {type(part).__name__}")
    # An assistant that was interrupted at once has said nothing; nobody else may.
    if role != "assistant" and not any(isinstance(part, Audio) or part.strip() for part in parts):
        raise ValueError(f"{where}: the {role} turn has neither audio nor text")
    return Message(role, tuple(parts))


def _read_part(part: object, where: str) -> str | Audio:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} must be a dictionary with a type, got {type(part).__name__}")
    kind = part.get("type")
    if kind == "text":
        if "text" not in part:
            raise ValueError(f"{where}: a text part wants the key 'text'")
        return part["text"]
    if kind == "audio":
        if part.get("audio") is None:
            raise ValueError(f"{where}: an audio part wants the key 'audio'")
        audio = part["audio"]
        if isinstance(audio, Mapping):  # as the datasets library decodes sound
            if audio.get("array") is None:
                raise ValueError(f"{where}: an audio dictionary wants 'array' and 'sampling_rate'")
            return _audio((audio["array"], audio.get("sampling_rate", BARE_ARRAY_RATE)), where)
        if isinstance(audio, np.ndarray):
            return _audio((audio, part.get("sampling_rate", BARE_ARRAY_RATE)), where)
        return _audio(audio, where)
    if kind == "input_audio":
        try:
            return _audio(base64.b64decode(part["input_audio"]["data"], validate=True), where)
        except (KeyError, TypeError, ValueError, binascii.Error) as e:
            raise AudioError(f"{where}: input_audio wants 'data', sound in base64") from e
    raise ValueError(f"{where}: unsupported content type {shown(kind)}; wanted text or audio")


def _audio(source: AudioSource, where: str) -> Audio:
    return Audio(
        source,
        os.fspath(source)
        if isinstance(source, str | os.PathLike) and source
        else f"audio of {where}",
    )


def chat_segments(
    messages: Sequence[Message], tokenizer: Tokenizer, config: ChromaConfig
) -> list[int | str]:
    """Control tokens (ids) and text (strings) of the conversation, ending where the assistant begins to speak.

    Each sound is one audio placeholder token. The checkpoint's own chat template is used where there is one. Control
    tokens come from the format alone: text that looks like one stays text. Raises ValueError for a template that cannot be
    rendered or drops a part of the conversation.
    """
    if tokenizer.chat_template is not None:
        segments = _render_template(messages, tokenizer)
    else:
        segments = _render_builtin(messages, tokenizer, config)
    wanted = sum(len(message.audios) for message in messages)
    found = segments.count(config.reasoner.audio_token_id)
    if found != wanted:
        raise ValueError(
            f"{tokenizer.name}: the chat template makes {found} audio placeholders "
            f"(token {config.reasoner.audio_token_id}), the conversation has {wanted} audios"
        )
    return segments


def _render_builtin(
    messages: Sequence[Message], tokenizer: Tokenizer, config: ChromaConfig
) -> list[int | str]:
    """ChatML with audio turns: <|im_start|>role \\n parts <|im_end|> \\n."""
    im_start = tokenizer.token_id(IM_START)
    if im_start is None:
        raise ValueError(f"{tokenizer.name} has no {IM_START} token and no chat template")
    reasoner = config.reasoner
    audio = [reasoner.audio_start_token_id, reasoner.audio_token_id, reasoner.audio_end_token_id]
    segments: list[int | str] = []
    for message in messages:
        segments += [im_start, f"{message.role}\n"]
        for part in message.parts:
            segments += audio if isinstance(part, Audio) else [part]
        segments += [config.im_end_token_id, "\n"]
    return [*segments, im_start, "assistant\n"]


def _template_environment():
    """A jinja environment that knows what transformers' chat templates may use, and nothing of this machine but the time."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}...{% endgeneration %}, which marks what the assistant says for training: its content."""

        tags = {"generation"}  # noqa: RUF012 (as jinja has it)

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    # jinja's own escapes what has a meaning in HTML.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return environment


def _render_template(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int | str]:
    """Renders the jinja template with a stand-in for every text, cuts the result at control tokens, and only then puts
    the texts in their places: so they are never searched for control tokens."""
    texts: list[str] = []

    def content(part: str | Audio) -> dict[str, str]:
        if isinstance(part, Audio):
            return {"type": "audio", "audio": "audio"}
        texts.append(part)
        # Private-use characters, which no template has a reason to contain.
        return {"type": "text", "text": f"\ue000{len(texts) - 1}\ue001"}

    filled = [{"role": m.role, "content": [content(part) for part in m.parts]} for m in messages]
    try:
        rendered = (
            _template_environment()
            .from_string(tokenizer.chat_template)
            .render(
                messages=filled,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **tokenizer.template_tokens,
            )
        )
    except Exception as e:  # a template is a program: it can raise anything
        raise ValueError(f"{tokenizer.name}: the chat template cannot be rendered: {e}") from e
    seen: set[int] = set()

    def text(match: re.Match) -> str:
        seen.add(int(match.group(1)))
        return texts[int(match.group(1))]

    segments = [
        re.sub("\ue000(\\d+)\ue001", text, s) if isinstance(s, str) else s
        for s in tokenizer.split_special(rendered)
    ]
    dropped = sorted(set(range(len(texts))) - seen)
    if dropped:
        raise ValueError(
            f"{tokenizer.name}: the chat template leaves out {shown(texts[dropped[0]])}"
        )
    return segments

"""One row: its script, its voices, its clips; what becomes of it. A function of the row's number and split.

A record is what the shards hold, kept or refused:

    {"id": ..., "split": ..., "reason": null, "kind": ..., "apart": ..., "manifest": {...}, "texts": [...], "clips": {...}, "scores": ...}

`manifest` is the line that `chroma_jax.prepare` reads, its paths relative to the directory.
"""

from __future__ import annotations

import random
from typing import Any

from chroma_jax.synthesis import filters
from chroma_jax.synthesis.clips import ANSWER, QUESTION, Clip, Clips
from chroma_jax.synthesis.config import SynthesisConfig
from chroma_jax.synthesis.script import Script, UnwritableError
from chroma_jax.synthesis.writers import Writer

Record = dict[str, Any]


def row_id(split: str, number: int) -> str:
    """The name of a row, from which its seed comes."""
    return f"{split}-{number:07d}"


def make_row(
    number: int, split: str, config: SynthesisConfig, writer: Writer, clips: Clips
) -> Record:
    """Writes and speaks one row; refused rows say why."""
    name = row_id(split, number)
    rng = random.Random(f"{config.seed}/{name}/voices")
    record: Record = {"id": name, "split": split, "reason": None}
    try:
        script = writer(number, split)
    except UnwritableError as e:
        return {**record, "reason": str(e)}
    record |= {"kind": script.kind, "apart": script.apart}
    record["texts"] = [*(line.text for line in script.turns), script.answer]
    if not filters.speakable(script.answer, config.filters):
        return {**record, "reason": "text"}
    answering = rng.choice([v.name for v in config.voices if v.can("answers", split)])
    others = [v.name for v in config.voices if v.can("questions", split) and v.name != answering]
    asking = rng.choice(others)
    take = rng.getrandbits(31)
    answer = clips.say(answering, script.answer, ANSWER, take)
    record["voices"] = {"answer": answering, "question": asking}
    record["scores"] = {"answer": answer.scores}
    if answer.reason:
        return {**record, "reason": answer.reason}
    heard = _hear(script, asking, clips, take)
    record["scores"]["questions"] = [clip.scores for clip in heard.values()]
    refused = [clip.reason for clip in heard.values() if clip.reason]
    if refused:
        return {**record, "reason": f"question {refused[0]}"}
    prompted = config.voice_prompts in (split, "both")
    prompt = clips.prompt(answering, rng.getrandbits(31)) if prompted else None
    if prompt and prompt[1] == script.answer:
        return {**record, "reason": "lone"}
    record["manifest"] = _manifest(name, script, heard, answer, answering, prompt, config.language)
    record["licences"] = sorted({v.licence for v in config.voices if v.name in (asking, answering)})
    return record


def _hear(script: Script, asking: str, clips: Clips, take: int) -> dict[int, Clip]:
    """The clips of the spoken turns, by turn; the first that is refused ends it."""
    heard: dict[int, Clip] = {}
    for i, line in enumerate(script.turns):
        if line.role == "user" and line.spoken:
            heard[i] = clips.say(asking, line.text, QUESTION, take)
            if heard[i].reason:
                break
    return heard


def _manifest(
    name: str,
    script: Script,
    heard: dict[int, Clip],
    answer: Clip,
    speaker: str,
    prompt: tuple[str, str] | None,
    language: str,
) -> dict[str, Any]:
    """The row as `chroma_jax.data.manifest` has it."""
    turns = [
        {"role": line.role, **({"audio": heard[i].file} if i in heard else {"text": line.text})}
        for i, line in enumerate(script.turns)
    ]
    last = turns.pop()
    row: dict[str, Any] = {"id": name}
    row |= {"question": last["audio"]} if "audio" in last else {"question_text": last["text"]}
    if turns:
        row["turns"] = turns
    row |= {"answer_text": script.answer, "answer_audio": answer.file, "speaker": speaker}
    if prompt:
        row |= {"voice_audio": prompt[0], "voice_text": prompt[1]}
    return {**row, "language": language}

"""Who writes what is said: (row number, split) -> a script, or UnwritableError with the reason that the row is counted under.

    world      the program of facts, see `world`
    endpoint   a model behind OpenAI's /chat/completions
    local      a model of transformers on this machine

A model answers questions from a file, or writes them itself, about given topics. What is drawn depends on seed, split and number.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence

from chroma_jax import paths
from chroma_jax.synthesis import endpoints, filters, world
from chroma_jax.synthesis.config import SPLITS, VALIDATION, SynthesisConfig, WriterConfig
from chroma_jax.synthesis.script import Line, Script, UnwritableError

Writer = Callable[[int, str], Script]
Chat = Callable[
    [Sequence[Mapping[str, str]], int], str
]  # messages and a seed -> what the model says

ANSWER = (
    "You answer aloud, in a friendly conversation. Say one or two short sentences and nothing else. No lists, headings, symbols, "
    "links or quotation marks. Write all numbers and abbreviations as words."
)
ASK = (
    "Think of one short question that somebody might ask a voice assistant about {topic}. Write only the question, in plain words "
    "that can be spoken, numbers as words."
)


def open_writer(config: SynthesisConfig) -> Writer:
    """Opens the writer that a configuration names. Raises ValueError for what is missing or too little."""
    writer = config.writer
    if writer.kind == "world":
        return lambda number, split: world.write(number, split, config.seed, writer.reading)
    chat = endpoint_chat(writer) if writer.kind == "endpoint" else local_chat(writer)
    questions = read_questions(writer) if writer.questions else None
    if questions is not None:
        for split in SPLITS:
            rows = getattr(config.rows, split)
            wanted = config.rows.first + rows if rows else 0
            if wanted > len(questions[split]):
                raise ValueError(
                    f"{writer.questions} has {len(questions[split])} questions for {split}, {wanted} rows want as many"
                )
    return ModelWriter(writer, chat, questions, config)


def read_questions(writer: WriterConfig) -> dict[str, list[str]]:
    """The questions of each split, in the file's order; equal ones once. Which split a question is in depends on its words alone."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen = set()
    try:
        with open(paths.expand(writer.questions), encoding="utf-8") as f:
            for line in f:
                question = " ".join(line.split())
                key = plain(question)
                if key and key not in seen:
                    seen.add(key)
                    split = SPLITS[world.kept_apart(key, writer.held_one_in)]
                    found[split].append(question)
    except OSError as e:
        raise ValueError(f"questions {writer.questions} cannot be read: {e.strerror or e}") from e
    return found


def plain(text: str) -> str:
    """A text by its words alone, for comparing."""
    return " ".join(re.findall(r"\w+", text.lower()))


class ModelWriter:
    """A language model that answers, and asks too where there is no list of questions."""

    def __init__(
        self,
        config: WriterConfig,
        chat: Chat,
        questions: Mapping[str, Sequence[str]] | None,
        whole: SynthesisConfig,
    ):
        self._config, self._chat, self._questions = config, chat, questions
        self._seed, self._filters = whole.seed, whole.filters

    def __call__(self, number: int, split: str) -> Script:
        """The script of a row."""
        rng = random.Random(f"{self._seed}/{split}/{number}")
        kind, question = "question", ""
        for _ in range(self._config.attempts):
            if self._questions is not None:
                question = self._questions[split][number]
            else:
                kind = rng.choice(self._config.topics)
                asked = ASK.format(topic=kind)
                question = self._say([{"role": "user", "content": asked}], rng)
                held = world.kept_apart(plain(question), self._config.held_one_in)
                if held != (split == VALIDATION):
                    continue  # whose split it is depends on its words
            if not filters.speakable(question, self._filters):
                continue
            answer = self._say(
                [
                    {"role": "system", "content": self._config.system or ANSWER},
                    {"role": "user", "content": question},
                ],
                rng,
            )
            if filters.speakable(answer, self._filters):
                apart = "question" if split == VALIDATION else ""
                return Script((Line("user", question),), answer, split, kind, apart)
        raise UnwritableError("unwritten")

    def _say(self, messages: Sequence[Mapping[str, str]], rng: random.Random) -> str:
        return " ".join(self._chat(messages, rng.getrandbits(31)).split()).strip(" \"'")


def endpoint_chat(config: WriterConfig) -> Chat:
    """A model behind an OpenAI-compatible server."""
    url = f"{config.url.rstrip('/')}/chat/completions"

    def chat(messages: Sequence[Mapping[str, str]], seed: int) -> str:
        asked = dict(
            model=config.model,
            messages=list(messages),
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            seed=seed,
        )
        answer = endpoints.post(url, asked, config.key)
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError) as e:
            raise ValueError(f"{url} answers no chat completion: {answer[:80]!r}") from e

    return chat


def local_chat(config: WriterConfig) -> Chat:
    """A causal model of transformers, on this machine."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as e:
        raise ValueError("writer local: pip install torch transformers") from e
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        model = AutoModelForCausalLM.from_pretrained(config.model)
    except OSError as e:
        raise ValueError(f"writer.model {config.model}: {str(e).splitlines()[0]}") from e
    model.eval()

    def chat(messages: Sequence[Mapping[str, str]], seed: int) -> str:
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        else:
            prompt = "\n".join(f"{m['role']}: {m['content']}" for m in messages) + "\nassistant:"
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        torch.manual_seed(seed)
        sampled = dict(do_sample=True, temperature=config.temperature) if config.temperature else dict(do_sample=False)  # fmt: skip
        with torch.no_grad():
            out = model.generate(
                **inputs,
                **sampled,
                max_new_tokens=config.max_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return chat


def digest(path: str) -> str:
    """Of a file's content, so that a directory knows when its questions change; "" for none."""
    if not path:
        return ""
    path = paths.expand(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:12]

"""What the programs of this folder share: models, forced lengths, prompts, timing, reports.

They run from a checkout, with or without the package installed, and need jax, flax and numpy alone.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
if importlib.util.find_spec("chroma_jax") is None:
    sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from chroma_jax import schedule  # noqa: E402
from chroma_jax.audio.batch import Inputs, normalize_inputs  # noqa: E402
from chroma_jax.config import ChromaConfig, LlamaConfig, presets  # noqa: E402
from chroma_jax.engine import caches, programs  # noqa: E402
from chroma_jax.engine.sampling import Sampling  # noqa: E402
from chroma_jax.engine.state import BeatState, Prompt, row_axes  # noqa: E402
from chroma_jax.evaluation.clock import Times, milliseconds, timed  # noqa: E402, F401
from chroma_jax.model.chroma import ChromaModel, abstract_model  # noqa: E402
from chroma_jax.model.flat import FlatModule  # noqa: E402
from chroma_jax.model.unstacked import arranged  # noqa: E402

if TYPE_CHECKING:
    from chroma_jax import Chroma, Voice

SIZES = {"tiny": presets.tiny, "chroma_100m": presets.chroma_100m, "chroma_4b": presets.chroma_4b}
FORCED = (
    "Text and speech are chosen greedily. The replies' lengths are forced: the weights of the heads are changed so that neither the "
    "end of the text nor the stop frame can be the likeliest, and the text is ended from outside where a table says so."
)


CHAT_TOKENS = 45  # of the chat format around a spoken question, with the default system prompt


class Subject(NamedTuple):
    """The model that is measured."""

    name: str
    config: ChromaConfig
    model: ChromaModel
    load_seconds: float
    notes: str
    flat: FlatModule  # the model as the programs of every beat are given it
    directory: str | None = None  # of a checkpoint: its tokenizer is there


def path(text: str) -> pathlib.Path:
    """An argument that is a path: no shell opens the `~` of --out=~/x."""
    return pathlib.Path(text).expanduser()


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags that all programs have."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = made.add_mutually_exclusive_group()
    which.add_argument("--size", choices=SIZES, default="tiny", help="random weights of this size")
    which.add_argument(
        "--checkpoint", type=os.path.expanduser, help="a checkpoint, instead of random weights"
    )
    made.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of Reasoner, Backbone and Decoder; default float32 on a CPU, else bfloat16",
    )
    made.add_argument("--quantize", choices=("int8", "fp8"), help="hold kernels in eight bits")
    made.add_argument("--layers", choices=("apart", "stacked"),
                      help="how the LLaMAs' layers are held, see chroma_jax/model/unstacked.py; default as the library's")  # fmt: skip
    made.add_argument("--out", type=path, help="a folder for the JSON of the results")
    made.add_argument("--quick", action="store_true", help="few repeats, few points: tries it all")
    made.add_argument("--budget", type=float, default=float("inf"),
                      help="seconds after which points not yet begun are left out")  # fmt: skip
    return made


def open_subject(args: argparse.Namespace, *, force: bool = True) -> Subject:
    """The model of --size or --checkpoint. Random weights are made on the device in their own dtype, never on the host."""
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    start, directory = time.perf_counter(), None
    if args.checkpoint:
        from chroma_jax.checkpoint import load  # needs orbax and safetensors

        loaded = load(args.checkpoint, dtype=dtype)
        name, config, model = args.checkpoint, loaded.config, loaded.model
        directory = loaded.directory
        notes = f"{dtype}. "
    else:
        name, config = args.size, SIZES[args.size]().with_dtype(dtype)
        model = hashed_model(config)
        notes = f"Random weights, {dtype}. "
    if force:
        model = endless(model)
        notes += FORCED
    if args.quantize:
        from chroma_jax.model.quantized import quantize

        model, notes = quantize(model, args.quantize), f"Kernels in {args.quantize}. {notes}"
        config = model.cfg
    model = arranged(model, args.layers)
    if args.layers:
        notes = f"Layers {args.layers}. {notes}"
    jax.block_until_ready(jax.tree.leaves(model))
    seconds = time.perf_counter() - start
    return Subject(name, config, model, seconds, notes, FlatModule.of(model), directory)


def chroma_of(subject: Subject) -> tuple[Chroma, dict[str, str]]:
    """The library's `Chroma` of the subject, and what its questions are to be given besides.

    Without a checkpoint the tokenizer is of bytes, and a shorter system prompt gives chat of as many tokens as a real one does.
    """
    from chroma_jax import Chroma
    from chroma_jax.audio.mel import MelConfig
    from chroma_jax.audio.prompt import Processor
    from chroma_jax.audio.tokenizer import tiny_tokenizer

    config = subject.config
    if subject.directory:
        return Chroma(subject.model, Processor.load(config, subject.directory)), {}
    mel = MelConfig(num_mel_bins=config.reasoner.audio.num_mel_bins)
    processor = Processor(config=config, tokenizer=tiny_tokenizer(config), mel=mel)
    around = processor.open_question((), None, ".")
    missing = CHAT_TOKENS - len(around.before.ids) - len(around.after)
    return Chroma(subject.model, processor), {"system_prompt": "." * (1 + max(0, missing))}


def noise(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """A sound of that length."""
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal(round(rate * seconds), np.float32)


def noise_voice(seconds: float, seed: int = 0) -> Voice:
    """A voice of that length, with 4 tokens of transcript a second where tokens are bytes."""
    from chroma_jax import Voice

    return Voice((noise(seconds, 24000, seed), 24000), "." * max(1, round(4 * seconds)))


def hashed_model(config: ChromaConfig) -> ChromaModel:
    """Random weights of about the usual sizes, from a hash of each weight's number: compiles in a tenth of a real generator's time."""
    graphdef, state = nnx.split(abstract_model(config))
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)

    def weights(seed: int, path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        x = jax.lax.iota(jnp.uint32, leaf.size) * jnp.uint32(2654435761) + jnp.uint32(40503 * seed)
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        uniform = x.astype(jnp.int32).astype(jnp.float32) * 2.0**-31
        # A standard deviation of 0.02; convolutions keep the size of what passes them; norms are near one.
        is_kernel = name.startswith("codec/") and len(leaf.shape) > 1
        bound = (3 * leaf.shape[-1] / leaf.size) ** 0.5 if is_kernel else 0.035
        uniform = bound * uniform + (1.0 if "scale" in name.split("/") else 0.0)
        return uniform.astype(leaf.dtype).reshape(leaf.shape)

    def make() -> list[jax.Array]:
        return [weights(i, *item) for i, item in enumerate(leaves)]

    return nnx.merge(graphdef, jax.tree.unflatten(tree, jax.jit(make)()))


def endless(model: ChromaModel) -> ChromaModel:
    """The model made unable to end a greedy reply by itself: two logits become the mean of two others, never the largest."""
    cfg, state = model.cfg, nnx.to_pure_dict(nnx.state(model))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def mute(table, token, axis):
        rows = jnp.moveaxis(table, axis, 0)
        others = [i for i in range(3) if i != token][:2]
        return jnp.moveaxis(rows.at[token].set((rows[others[0]] + rows[others[1]]) / 2), 0, axis)

    reasoner, backbone = state["reasoner"], state["backbone"]
    if cfg.reasoner.tie_embeddings:
        reasoner["embedding"] = mute(reasoner["embedding"], cfg.im_end_token_id, 0)
    else:
        reasoner["head"] = mute(reasoner["head"], cfg.im_end_token_id, 1)
    backbone["head"] = mute(backbone["head"], cfg.codebook_eos_token_id, 1)
    graphdef = nnx.split(model)[0]
    return nnx.merge(graphdef, state)


def end_text(config: ChromaConfig, state: BeatState) -> BeatState:
    """The state with the end of the text as the next text token of every row."""
    return state._replace(token=jnp.full_like(state.token, config.im_end_token_id))


def make_prompt(
    config: ChromaConfig, rows: int = 1, question_seconds: float = 8.0, voice_seconds: float = 8.0
) -> Prompt:
    """Random questions and voices, padded as the library pads: tokens of chat around 25 a second of sound, 4 of transcript."""
    rng = np.random.default_rng(0)
    reasoner, audio, codec = config.reasoner, config.reasoner.audio, config.codec
    words = min(reasoner.audio_token_id, config.im_end_token_id, 256)
    mel_frames = round(100 * question_seconds)
    ids = rng.integers(0, words, (rows, CHAT_TOKENS))
    heard = np.full((rows, audio.num_features(mel_frames)), reasoner.audio_token_id)
    voice_frames = max(1, round(voice_seconds * codec.frame_rate))
    batch = normalize_inputs(
        config,
        Inputs(
            question_ids=np.concatenate([ids[:, :40], heard, ids[:, 40:]], axis=1),
            mel=rng.standard_normal((rows, audio.num_mel_bins, mel_frames), np.float32),
            voice_ids=rng.integers(0, words, (rows, max(1, round(4 * voice_seconds)))),
            voice_wave=np.zeros((rows, voice_frames * codec.frame_samples), np.float32),
        ),
    )
    # A voice's codes are computed once and kept: they are no part of a reply.
    size = batch.voice_wave.shape[1] // codec.frame_samples
    codes = rng.integers(1, codec.codebook_size, (rows, size, config.num_codebooks))
    return programs.as_prompt(batch, codes, np.full(rows, voice_frames))


class Live:
    """A reply as a live stream runs it: a prefill, then single beats, in caches that grow as the library's do."""

    def __init__(
        self,
        subject: Subject,
        prompt: Prompt,
        frames: int,
        *,
        audio: bool = True,
        grow: bool = True,
    ):
        self.subject, self.audio = subject, audio
        rows = len(prompt.lengths)
        self.ledger = caches.ledger_of(subject.config, prompt, frames, grow=grow)
        self.state = programs.begin(
            subject.flat, prompt, frames, [Sampling()] * rows, [0] * rows, self.ledger.sizes()
        )

    def beat(self) -> Any:
        """One beat of every row, its samples on the host."""
        state = self.ledger.make(self.state)
        self.state, out = programs.beat(self.subject.flat, state, audio=self.audio)
        return jax.device_get(out)

    def run(self, count: int, text_beats: int | None = None, sizes: list | None = None) -> Times:
        """Seconds of each of `count` beats; the text ends with beat number `text_beats`. Adds the caches' positions to `sizes`."""
        times = Times()
        for i in range(count):
            if i + 1 == text_beats:
                self.state = end_text(self.subject.config, self.state)
            start = time.perf_counter()
            self.beat()
            times.append(time.perf_counter() - start)
            if sizes is not None:
                sizes.append((self.state.reasoner.size, self.state.backbone.size))
        return times


def widen(state: BeatState, rows: int) -> BeatState:
    """A state of one row repeated to `rows`: a batch of streams without their prefill."""

    @functools.partial(jax.jit, static_argnums=1)
    def repeat(state, rows):
        return jax.tree.map(lambda x, axis: jnp.repeat(x, rows, axis), state, row_axes(state))

    return repeat(state, rows)


def step_through(step: Callable, state: Any, *, repeats: int, warm: int = 1) -> tuple[Times, Any]:
    """As `timed`, for a step state -> (state, out) that may donate its state."""
    times = Times()
    for i in range(warm + repeats):
        start = time.perf_counter()
        state, out = step(state)
        jax.block_until_ready((state, out))
        if i >= warm:
            times.append(time.perf_counter() - start)
    return times, state


def count_beats(config: ChromaConfig, seconds: float) -> int:
    """Beats of that many seconds of speech, whole ones."""
    return max(1, round(seconds * config.codec.frame_rate / schedule.FRAMES_PER_TEXT))


def beat_seconds(config: ChromaConfig) -> float:
    """Sound of one beat."""
    return schedule.FRAMES_PER_TEXT / config.codec.frame_rate


def peak_memory() -> tuple[str, float]:
    """What is measured and the most of it so far, bytes: the device's, or on a CPU the process's resident set."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return "device memory", float(stats["peak_bytes_in_use"])
    return "resident set", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def memory_in_use() -> tuple[str, float]:
    """What is counted and how much of it there is now, bytes: the device's memory, or all live arrays where it does not report it."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_in_use" in stats:
        return "device memory", float(stats["bytes_in_use"])
    return "live arrays", float(sum(x.nbytes for x in jax.live_arrays()))


def cache_bytes(config: LlamaConfig, rows: int, positions: int) -> int:
    """Bytes of keys and values, from the configuration."""
    numbers = 2 * config.num_layers * rows * positions * config.num_kv_heads * config.head_dim
    return numbers * jnp.dtype(config.dtype).itemsize


class Report:
    """Tables as they come: printed as Markdown, and all so far written as JSON."""

    def __init__(self, name: str, args: argparse.Namespace, **about: Any):
        self.start = time.perf_counter()
        self.budget = getattr(args, "budget", float("inf"))
        self._path = args.out and args.out / f"{name}.json"
        self.content = {"name": name, **environment(), **about, "tables": {}}
        about_lines = [f"{k}: {v}" for k, v in self.content.items() if k not in ("name", "tables")]
        print(f"## {name}\n\n" + "\n".join(about_lines), flush=True)

    def out_of_time(self) -> bool:
        """Whether what has not begun is to be left out."""
        return time.perf_counter() - self.start > self.budget

    def table(self, title: str, rows: Sequence[dict[str, Any]], note: str = "") -> None:
        """A table from rows with the same keys, and what is to be said below it."""
        if rows:
            print(f"\n### {title}\n\n{markdown(rows)}", flush=True)
        else:
            note = f"nothing measured{': ' * bool(note)}{note}"
            print(f"\n### {title}")
        if note:
            print(f"\n{note}", flush=True)
        self.content["tables"][title] = {"rows": list(rows), "note": note}
        self.write()

    def keep(self, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Writes what there is of a table that is still being measured: a run that is stopped keeps it."""
        self.content["tables"][title] = {"rows": list(rows), "note": "not finished"}
        self.write()

    def write(self) -> None:
        """Writes the JSON anew."""
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.content["seconds"] = round(time.perf_counter() - self.start, 1)
            self.content["peak memory"] = peak_memory()
            self._path.write_text(json.dumps(self.content, indent=1, default=str) + "\n")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows with the same keys."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def environment() -> dict[str, str]:
    """Versions, device, commit, command: what a figure means nothing without."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "device": f"{device.platform}: {device.device_kind}",
        "host": f"{os.cpu_count()} CPU cores ({_cpu_name()}), load {os.getloadavg()[0]:.1f}",
        "flags": os.environ.get("XLA_FLAGS", ""),
    }


def _commit() -> str:
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = git(
            ["git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"]
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" and changes" if changed else "")


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def weight_bytes(*modules: Any) -> int:
    """Bytes of the parameters."""
    leaves: Iterable[jax.Array] = jax.tree.leaves(modules)
    return sum(leaf.nbytes for leaf in leaves)

"""Manifest and sound files -> a dataset of dialogue records. The work behind `python -m chroma_jax.prepare`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import jax
from tqdm import tqdm

from chroma_jax import paths
from chroma_jax.audio.prompt import DEFAULT_SYSTEM_PROMPT, Processor
from chroma_jax.checkpoint import load, resolve_source
from chroma_jax.checkpoint.torch_files import read_config
from chroma_jax.config import ChromaConfig
from chroma_jax.data import files, shards
from chroma_jax.data import metadata as md
from chroma_jax.data.check_rows import BadRowsError, find_bad_rows, tell_bad_rows
from chroma_jax.data.encode import Encoder
from chroma_jax.data.make_records import make_records
from chroma_jax.data.manifest import (
    BadRow,
    Row,
    Sounds,
    bad_row,
    content,
    load_row,
    read_manifest,
)
from chroma_jax.data.records import HIDDEN_DTYPES
from chroma_jax.data.voices import VoiceLimits
from chroma_jax.messages import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to prepare. Those of the second group may differ between runs into the same directory."""

    max_voice_seconds: float = 10.0
    max_voice_tokens: int = 96
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    precompute_hidden: bool = False  # run the Reasoner now; the records then hold its states instead of the question's sound
    hidden_dtype: str = "bfloat16"
    dtype: str | None = None  # of the Reasoner's arithmetic; default as stored
    shard_size: int = 256  # rows

    on_bad_row: str = "fail"  # or "skip"
    check: str = "full"  # reads all sound before starting; "headers" only looks whether it is there
    batch_seconds: float = 160.0  # sound per device and batch
    batch_tokens: int = 8192  # Reasoner positions per device and batch
    threads: int = 8  # that read sound

    def __post_init__(self):
        for name, choices in (
            ("hidden_dtype", HIDDEN_DTYPES),
            ("dtype", (None, "float32", "bfloat16", "float16")),
            ("on_bad_row", ("fail", "skip")),
            ("check", ("full", "headers")),
        ):
            if getattr(self, name) not in choices:
                wanted = ", ".join(map(str, choices))
                raise ValueError(
                    f"{name} must be one of {wanted}, got {shown(getattr(self, name))}"
                )
        for name in ("max_voice_seconds", "max_voice_tokens", "shard_size", "batch_seconds", "batch_tokens", "threads"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def prepare(
    manifest: str | os.PathLike,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    options: Options | None = None,
    *,
    process_id: int = 0,
    num_processes: int = 1,
    only_finish: bool = False,
    say: Callable[[str], None] = lambda line: None,
    before_loading: Callable[[], None] = lambda: None,
    devices: Sequence[jax.Device] | None = None,
) -> md.Metadata | None:
    """Makes this process's shards of a dataset, and the dataset's metadata when all shards are there.

    Shard s, `shard_size` rows of the manifest, belongs to process s % num_processes. All processes write into the same directory, on a
    file system that they share; they need not run at the same time. A run into a directory that an interrupted run left does only
    what is missing.

    Args:
      manifest: see `chroma_jax.data.manifest`.
      checkpoint: a directory or Hub id; its Codec, tokenizer and (for `precompute_hidden`) Reasoner are used.
      out: the directory to make.
      options: how.
      process_id: which process this is.
      num_processes: how many there are.
      only_finish: make no shards, only complete a dataset whose shards are all there.
      say: told, a line each, what happens.
      before_loading: called when rows are checked, before weights are read. Processes of one jax.distributed job read them
        together: here is where those that are ahead can wait.
      devices: where models run; default all of this process.

    Returns:
      The metadata; or None while shards of other processes are missing.

    Raises:
      BadRowsError: rows cannot be used.
      ValueError, OSError: anything else that the caller can mend; the message names it. Finished shards stay.
    """
    options = options or Options()
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id must be from 0 to num_processes - 1 = {num_processes - 1}, got {process_id}"
        )
    shards.array_record_module()
    manifest, out = paths.expand(manifest), paths.absolute(out)
    rows, hashes = read_manifest(manifest)
    directory = resolve_source(checkpoint)
    config = read_config(directory)
    processor = Processor.load(config, directory, system_prompt=options.system_prompt)
    work = _Work(manifest, out, options, config, processor, rows, hashes)
    _make_directory(out)
    done = work.check_directory()
    if done is not None:
        again = 0 if only_finish else work.reopen()
        if not again:
            say(f"{out} is complete: {done.num_records} records, nothing to do")
            return done
        say(f"{again} shards are made again: files of rows that were left out have come or changed")
    if only_finish:
        return work.finish_only()
    mine = range(process_id, len(work.keys), num_processes)
    with shards.exclusive(out, process_id, say):
        work.run(mine, directory, say, before_loading, devices)
        metadata = work.finish()
    if metadata is None:
        missing = sum(
            shards.read_note(out, number, key) is None for number, key in enumerate(work.keys)
        )
        say(
            f"this process is done; {missing} shards of other processes are missing. "
            "The last process completes the dataset, or a run with --finish"
        )
    else:
        voices = metadata.statistics["voices"]
        say(f"{metadata.num_records} records in {out}; {len(metadata.skipped)} rows left out")
        if voices["the answer itself"]:
            say(
                f"{voices['the answer itself']} records have no other utterance of their speaker and no voice_audio: "
                "they will be spoken with themselves as voice prompt"
            )
    return metadata


class _Work:
    """One run: what is asked, and what of it is there."""

    def __init__(
        self,
        manifest: str,
        out: str,
        options: Options,
        config: ChromaConfig,
        processor: Processor,
        rows: list[Row | BadRow],
        hashes: list[str],
    ):
        self.manifest, self.out, self.options = manifest, out, options
        self.config, self.processor = config, processor
        size = options.shard_size
        self.bad = [row for row in rows if isinstance(row, BadRow)]
        self.shards = [
            [row for row in rows[i : i + size] if isinstance(row, Row)]
            for i in range(0, len(rows), size)
        ]
        # The same line elsewhere in the file is another record: its number is in it.
        self.keys = [md.fingerprint([i, hashes[i : i + size]]) for i in range(0, len(hashes), size)]
        frames = int(options.max_voice_seconds * config.codec.frame_rate)
        self.limits = VoiceLimits(max_frames=frames, max_tokens=options.max_voice_tokens)
        self.plan: dict[str, Any] = {
            "config": md.config_parts(config, processor.mel),
            "tokenizer": md.tokenizer_fingerprint(processor.tokenizer),
            "hidden": None,
            "settings": {
                "max_voice_frames": frames,
                "max_voice_tokens": options.max_voice_tokens,
                "system_prompt": options.system_prompt,
                "shard_size": size,
            },
        }
        if options.precompute_hidden:
            width = config.reasoner.text.hidden_size
            self.plan["hidden"] = {
                "dtype": options.hidden_dtype,
                "width": width,
                "arithmetic": options.dtype or "as stored",
            }

    def check_directory(self) -> md.Metadata | None:
        """The metadata if all work is done already. Raises DatasetError if the directory holds something else."""
        begun = self._begun()
        if begun is not None:
            self._compare(begun, known_only=True)
        elif any(not name.startswith(".") for name in paths.names(self.out)):
            raise md.DatasetError(
                f"{self.out} is not empty and holds no dataset that was begun; choose another --out"
            )
        if not paths.at(os.path.join(self.out, md.METADATA)).exists():
            return None
        done = md.read_metadata(self.out)
        skipped = [row["line"] for row in done.skipped]
        if begun is None or done.key != shards.plan_key(begun, self.keys, skipped):
            raise md.DatasetError(
                f"{self.out} holds a finished dataset of another manifest; choose another --out"
            )
        return done

    def reopen(self) -> int:
        """Makes a complete dataset an incomplete one if rows that were left out may be usable now: how many shards have such."""
        with ThreadPoolExecutor(self.options.threads) as pool:
            again = [n for n, _ in enumerate(self.keys) if self._note(n, pool) is None]
        if again:
            with contextlib.suppress(FileNotFoundError):  # another process was first
                paths.at(os.path.join(self.out, md.METADATA)).unlink()
        return len(again)

    def _note(self, number: int, pool: Executor) -> shards.Note | None:
        """The note of a shard that is done and would come out the same again."""
        note = shards.read_note(self.out, number, self.keys[number])
        if note is None:
            return None
        rows = {row.line: row for row in self.shards[number]}
        left_out = [bad for bad in note.skipped if bad.line in rows]
        now = pool.map(content, (rows[bad.line] for bad in left_out))
        return note if all(a.files == b for a, b in zip(left_out, now, strict=True)) else None

    def _begun(self) -> dict[str, Any] | None:
        path = os.path.join(self.out, shards.PLAN)
        try:
            return json.loads(paths.at(path).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as e:
            raise md.DatasetError(f"{path} is damaged: {e}") from e

    def _compare(self, begun: Mapping[str, Any], *, known_only: bool) -> None:
        """Raises DatasetError naming the first setting in which the directory's shards differ from this run."""
        got, want = _flat(begun), _flat(json.loads(json.dumps(self.plan)))
        if known_only:
            weights = ("codec", "hidden/reasoner")
            got = {key: value for key, value in got.items() if key not in weights}
        for key in sorted(set(got) | set(want)):
            if got.get(key) != want.get(key):
                raise md.DatasetError(
                    f"{self.out} was begun with other settings: {key.removeprefix('settings/')} was {shown(got.get(key))}, "
                    f"now it is {shown(want.get(key))}; choose another --out"
                )

    def run(
        self,
        mine: Sequence[int],
        directory: str,
        say: Callable[[str], None],
        before_loading: Callable[[], None],
        devices: Sequence[jax.Device] | None,
    ) -> None:
        """Makes those of the shards `mine` that are missing."""
        with ThreadPoolExecutor(self.options.threads) as pool:
            notes = {number: self._note(number, pool) for number in mine}
        todo = [number for number in mine if notes[number] is None]
        bad = [*self.bad, *(row for note in notes.values() if note for row in note.skipped)]
        wrong: dict[int, list[BadRow]] = {}
        total = sum(len(self.shards[number]) for number in mine)
        left = sum(len(self.shards[number]) for number in todo)
        with ThreadPoolExecutor(self.options.threads) as pool:
            with _bar("checking", left) as bar:
                for number in todo:
                    wrong[number] = self._check(number, pool, bar)
                    bad += wrong[number]
            self._report(bad, say)
            if left < total:
                say(f"resuming: {total - left} of {total} rows are done")
            # Processes of one jax.distributed job load together, or wait for each other for ever.
            if not todo and jax.process_count() == 1:
                return
            before_loading()
            encoder = self._encoder(directory, devices)
            with _bar("encoding", total, total - left) as bar:  # fmt: skip
                loads = None
                for at, number in enumerate(todo):
                    loads = loads or self._load(number, wrong, pool)
                    # The next shard's sound is read while this one's is encoded.
                    ahead = self._load(todo[at + 1], wrong, pool) if at + 1 < len(todo) else None
                    late = self._make(number, loads, wrong[number], encoder)
                    loads = ahead
                    bad += late
                    if late:
                        self._report(late, say)
                    bar.update(len(self.shards[number]))

    def _check(self, number: int, pool: Executor, bar: tqdm) -> list[BadRow]:
        full = self.options.check == "full"
        return find_bad_rows(
            self.shards[number], self.processor, self.limits, full=full, pool=pool, checked=bar.update
        )  # fmt: skip

    def _report(self, bad: Sequence[BadRow], say: Callable[[str], None]) -> None:
        """Tells bad rows. Raises BadRowsError unless they are to be skipped."""
        tell_bad_rows(bad, self.manifest, say, fail=self.options.on_bad_row == "fail")

    def _encoder(self, directory: str, devices: Sequence[jax.Device] | None) -> Encoder:
        """Loads the weights, and settles what the directory's shards are made with."""
        # Only what is run, and on the host: the encoder spreads it over the accelerators.
        try:
            host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
            host = None
        stages = ["codec", "reasoner"] if self.options.precompute_hidden else ["codec"]
        loaded = load(directory, dtype=self.options.dtype, shardings=host, stages=stages)
        self.plan["codec"] = md.weights_fingerprint(loaded.model.codec)
        reasoner = None
        if self.options.precompute_hidden:
            reasoner = loaded.model.reasoner
            self.plan["hidden"]["reasoner"] = md.weights_fingerprint(reasoner)
        begun = self._begun()
        if begun is None:
            path = os.path.join(self.out, shards.PLAN)
            files.write_atomically(path, json.dumps(self.plan, indent=1).encode())
        else:
            self._compare(begun, known_only=False)
        return Encoder(
            loaded.config,
            loaded.model.codec,
            reasoner,
            batch_seconds=self.options.batch_seconds,
            batch_tokens=self.options.batch_tokens,
            devices=devices,
        )

    def _load(self, number: int, wrong: Mapping[int, Sequence[BadRow]], pool: Executor) -> list:
        lines = {row.line for row in wrong[number]}
        rows = [row for row in self.shards[number] if row.line not in lines]
        return [(row, pool.submit(load_row, row, self.processor, self.limits)) for row in rows]

    def _make(self, number: int, loads: list, wrong: list[BadRow], encoder: Encoder) -> list:
        """Encodes and writes a shard; returns rows that turned out bad only now."""
        rows: list[tuple[Row, Sounds]] = []
        late = []
        for row, future in loads:
            try:
                rows.append((row, future.result()))
            except (ValueError, OSError) as e:
                late.append(bad_row(row, e))
        if late and self.options.on_bad_row == "fail":
            raise BadRowsError(late, self.manifest)
        wanted = self.options.hidden_dtype if self.options.precompute_hidden else None
        content = make_records(self.processor, encoder, rows, wanted)
        shards.write_shard(
            self.out, number, self.keys[number], content, sorted([*wrong, *late]), self.config
        )
        return late

    def finish(self) -> md.Metadata | None:
        """Completes the dataset if all shards are there."""
        if "codec" not in self.plan:  # this run had no shards to make
            begun = self._begun()
            if begun is None:
                return None
            self.plan = begun
        return shards.finish(self.out, self.plan, self.keys, self.bad)

    def finish_only(self) -> md.Metadata:
        """`finish`, or a DatasetError telling what is missing."""
        metadata = self.finish()
        if metadata is None:
            missing = [
                number
                for number, key in enumerate(self.keys)
                if shards.read_note(self.out, number, key) is None
            ]
            raise md.DatasetError(
                f"{self.out} cannot be finished: {len(missing)} of {len(self.keys)} shards are missing, the first is "
                f"{shards.shard_name(missing[0])}"
            )
        return metadata


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as {"a/b": value}; an empty one is None."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}/{key}" if prefix else key)
    return out


def _bar(what: str, total: int, done: int = 0) -> tqdm:
    """A progress bar; in a log file, a line every half minute."""
    seldom = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(desc=what, total=total, initial=done, unit="row", mininterval=seldom, delay=seldom)


def _make_directory(out: str) -> None:
    """Makes `out` and tries to write there. Raises DatasetError."""
    if paths.is_remote(out):
        probe = paths.at(os.path.join(out, f".{secrets.token_hex(8)}.probe"))
        try:
            probe.write_bytes(b"x")
            probe.unlink()
        except Exception as e:  # of credentials, of the bucket, of the network
            raise md.DatasetError(f"{out} cannot be written: {e}") from e
        return
    try:
        os.makedirs(out, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as e:
        raise md.DatasetError(f"{out} cannot be written: {e.strerror or e}") from e

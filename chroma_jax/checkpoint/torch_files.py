"""A checkpoint in the Hub's layout: config.json beside model.safetensors, or beside shards with an index."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
from typing import Any

import numpy as np

from chroma_jax import paths
from chroma_jax.checkpoint.safetensors_io import TensorInfo, read_header, read_tensor
from chroma_jax.checkpoint.torch_table import (
    CheckpointError,
    raise_problems,
    under_table_names,
)
from chroma_jax.config import ChromaConfig, hf

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What travels beside the weights: tokenizer, feature extractor, chat template, generation defaults, licence.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "NOTICE*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class TorchFiles:
    """An opened checkpoint: every file's header has been read and checked, no tensor yet.

    `tensors` go by the names that the table knows (see `under_table_names`).
    """

    directory: str
    config: ChromaConfig
    tensors: dict[str, TensorInfo]

    def read(self, name: str, reuse: bool = False) -> np.ndarray:
        """One tensor; `reuse` as in `read_tensor`."""
        return read_tensor(self.tensors[name], reuse)


def open_torch(directory: str | os.PathLike) -> TorchFiles:
    """Opens a directory in the Hub's layout.

    Raises CheckpointError (a ValueError) naming the file: no such directory, no or bad config.json, no weights, a shard
    that is missing, truncated or corrupted, a tensor that index and shards do not agree on.
    """
    directory = paths.expand(directory)
    if not os.path.isdir(directory):
        raise CheckpointError(f"no such directory: {directory}")
    config, tensors = read_config(directory), _read_tensors(directory)
    try:
        return TorchFiles(directory, config, under_table_names(tensors))
    except CheckpointError as e:
        raise CheckpointError(f"{directory}: {e}") from e


def read_config(directory: str) -> ChromaConfig:
    """The directory's config.json. Raises CheckpointError naming the file."""
    try:
        return hf.load(os.path.join(directory, CONFIG_FILE))
    except FileNotFoundError as e:
        raise CheckpointError(f"{directory} has no {CONFIG_FILE}: it is no checkpoint") from e
    except ValueError as e:
        raise CheckpointError(str(e)) from e
    except OSError as e:
        raise CheckpointError(f"cannot read {e.filename}: {e.strerror}") from e


def read_json(path: str) -> Any:
    """A JSON file. Raises CheckpointError naming it."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from e
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e


def side_files(directory: str) -> list[str]:
    """Names of the files that a copy of the checkpoint in another format takes along, config.json included."""
    taken = []
    for name in sorted(os.listdir(directory)):
        weights = name.endswith(".index.json") or name == "chroma_jax.json"
        if not weights and any(fnmatch.fnmatch(name, p) for p in SIDE_FILES):
            taken.append(name)
    return [name for name in taken if os.path.isfile(os.path.join(directory, name))]


def _read_tensors(directory: str) -> dict[str, TensorInfo]:
    # As in transformers, the single file wins where both are there.
    single, index = (os.path.join(directory, name) for name in (SINGLE_FILE, INDEX_FILE))
    if os.path.exists(single):
        return read_header(single)
    if os.path.exists(index):
        return _read_shards(directory, index)
    raise CheckpointError(f"{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_shards(directory: str, index: str) -> dict[str, TensorInfo]:
    weight_map = read_json(index)
    weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
    if not isinstance(weight_map, dict) or not all(_is_file_name(v) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not os.path.exists(os.path.join(directory, shard))]
    if absent:
        raise CheckpointError(
            f"{directory} lacks {len(absent)} of the {len(shards)} shards in its index, first {absent[0]}"
        )
    tensors: dict[str, TensorInfo] = {}
    problems = []
    for shard in shards:
        for name, info in read_header(os.path.join(directory, shard)).items():
            if weight_map.get(name) == shard:
                tensors[name] = info
            elif name in weight_map:
                problems.append(
                    f"tensor {name} is in {shard} too; the index has it in {weight_map[name]}"
                )
            else:
                problems.append(f"tensor {name} is in {shard}, but not in the index")
    problems += [
        f"tensor {name} should be in {shard}, says the index, and is not"
        for name, shard in weight_map.items()
        if name not in tensors
    ]
    raise_problems(index, problems)
    return tensors


def _is_file_name(value: Any) -> bool:
    return (
        isinstance(value, str) and os.path.basename(value) == value and value not in ("", ".", "..")
    )


def resolve_source(source: str | os.PathLike) -> str:
    """A local directory as it is, or the local copy of a Hub repository "owner/name", downloaded if need be.

    Raises CheckpointError that says what to do: no such directory, no such repository, licence not accepted or no token,
    no connection.
    """
    source = os.path.expanduser(os.fspath(source))
    if paths.is_remote(source):
        return _mirror(paths.absolute(source))
    if os.path.isdir(source):
        return source
    if os.path.exists(source):
        raise CheckpointError(f"{source} is a file; the checkpoint's directory is wanted")
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"no such directory: {source}")
    return _download(source)


def _mirror(source: str) -> str:
    """The local copy of a converted checkpoint in an object store, downloaded if need be: what the Hub's cache is for its models."""
    try:
        manifest = paths.at(f"{source}/chroma_jax.json").read_bytes()
        names = json.loads(manifest)["files"]
    except FileNotFoundError as e:
        raise CheckpointError(f"{source} is no converted checkpoint, or not a whole one") from e
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{source}/chroma_jax.json is damaged: {e}") from e
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    stands_for = hashlib.sha256(source.encode() + manifest).hexdigest()[:24]
    copy = os.path.join(cache, "chroma_jax", stands_for)
    if os.path.isdir(copy):
        return copy
    os.makedirs(os.path.dirname(copy), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(copy)) as folder:
        new = os.path.join(folder, "new")
        for name in (*names, "chroma_jax.json"):
            file = os.path.join(new, name)
            os.makedirs(os.path.dirname(file), exist_ok=True)
            with open(file, "wb") as f, paths.at(f"{source}/{name}").open("rb") as remote:
                shutil.copyfileobj(remote, f, 16 * 2**20)
        with contextlib.suppress(OSError):  # another process was first
            os.rename(new, copy)
    return copy


def _download(repo: str) -> str:
    # Imported here: it takes half a second, and local checkpoints never need it.
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    sign_in = "then sign in with `hf auth login` or set HF_TOKEN"
    try:
        return huggingface_hub.snapshot_download(
            repo, allow_patterns=[*SIDE_FILES, "*.safetensors"]
        )
    except errors.GatedRepoError as e:
        message = f"{repo} is gated: accept its licence on {page}, {sign_in}"
        raise CheckpointError(message) from e
    except errors.RepositoryNotFoundError as e:
        raise CheckpointError(
            f"no directory and no Hub repository {repo}; if it is private, ask for access on {page}, {sign_in}"
        ) from e
    except errors.HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        if status in (401, 403):
            message = f"the Hub refused {repo} ({status}): accept its licence on {page}, {sign_in}"
            raise CheckpointError(message) from e
        raise CheckpointError(f"the Hub could not send {repo}: {_first_line(e)}") from e
    # Whatever else: not cached and offline, no network, a full disk. The HTTP library under the Hub's client changes
    # from version to version, and its errors have no common base.
    except Exception as e:
        raise CheckpointError(
            f"no directory {repo}, and it could not be downloaded from the Hub (offline?): {_first_line(e)}"
        ) from e


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

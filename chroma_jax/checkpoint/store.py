"""Our own checkpoints: a directory with an Orbax tree of parameters, and everything else a user of them needs.

    config.json, tokenizer files, ...   as in the PyTorch checkpoint; config.json says whether weights are quantised
    chroma_jax.json                     manifest: format, dtype of every PyTorch tensor, size of every file
    params/                             Orbax: the parameters, nested by path

The manifest is written last and lists every file with its size, so that a directory that was copied in part is told from
a whole one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from chroma_jax import paths
from chroma_jax.checkpoint import params, quantizing
from chroma_jax.checkpoint.from_torch import load_torch
from chroma_jax.checkpoint.literal import literal
from chroma_jax.checkpoint.params import Shardings
from chroma_jax.checkpoint.processes import by_first
from chroma_jax.checkpoint.safetensors_io import DTYPES, NAMES
from chroma_jax.checkpoint.staging import check_space, staged
from chroma_jax.checkpoint.torch_files import CONFIG_FILE, read_config, read_json, resolve_source
from chroma_jax.checkpoint.torch_table import CheckpointError, leaf_for
from chroma_jax.config import ChromaConfig, hf
from chroma_jax.model.chroma import ChromaModel

MANIFEST = "chroma_jax.json"
PARAMS = "params"
FORMAT, VERSION = "chroma_jax", 1
_CHUNK_BYTES = 64 * 2**20
# Parameters go to and from the disk in groups of at least this much, unless one alone is larger.
GROUP_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What chroma_jax.json holds.

    source: where the parameters came from. tied: whether the Reasoner's head is its embedding. tensors: PyTorch name ->
    safetensors dtype, which export writes (that of before, where weights are quantised). skipped: counts and bytes of what was left out. files: relative path -> bytes.
    """

    source: str
    tied: bool
    tensors: Mapping[str, str]
    skipped: Mapping[str, int]
    files: Mapping[str, int]


def orbax_context() -> ocp.Context:
    """Orbax as this project uses it: uncompressed, because weights are noise, and any subset of parameters at a time.

    Chunks are cut along the leading axis, which costs no transposition, so that a device which holds a slice of a parameter
    need not read all of it at once. Data files of about a chunk spare Orbax the gathering of chunks in memory.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.array.saving.storage_options.shard_axes = (0,)
    context.array.saving.ocdbt_target_data_file_size = _CHUNK_BYTES
    context.pytree.loading.partial_load = True
    return context


def nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}: how parameters lie in Orbax."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def unnest(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`nest` undone."""
    is_leaf = lambda x: not isinstance(x, Mapping)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {params.path_name(path): leaf for path, leaf in leaves}


def groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The paths, in order, in groups that are read or written together."""
    group, total = [], 0
    for path, nbytes in sizes.items():
        if group and total + nbytes > GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(path)
        total += nbytes
    if group:
        yield group


def write_manifest(directory: str, manifest: Manifest) -> None:
    """Lists the directory's files and writes the manifest, which makes it complete."""
    files = {}
    for path in _files(directory):
        if not os.path.basename(path).startswith("."):
            files[os.path.relpath(path, directory)] = paths.size(path)
    written_by = {
        name: _version(name) for name in ("chroma_jax", "jax", "flax", "orbax-checkpoint", "numpy")
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": written_by,
        "source": manifest.source,
        "tie_word_embeddings": manifest.tied,
        "skipped": dict(manifest.skipped),
        "files": dict(sorted(files.items())),
        "tensors": dict(sorted(manifest.tensors.items())),
    }
    text = json.dumps(content, indent=1)
    if paths.is_remote(directory):
        paths.at(os.path.join(directory, MANIFEST)).write_text(text)
        return
    with open(os.path.join(directory, MANIFEST), "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _files(directory: str) -> Iterator[str]:
    """Paths of all files in a directory and below it."""
    for path in sorted(paths.at(directory).iterdir()):
        if path.is_dir():
            yield from _files(os.fspath(path))
        else:
            yield os.fspath(path)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def read_manifest(directory: str) -> Manifest:
    """The manifest, after a check that every file it lists is there. Raises CheckpointError naming the file."""
    path = os.path.join(directory, MANIFEST)
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no manifest of a {FORMAT} checkpoint")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {content.get('version')}; this program reads {VERSION}"
        )
    tensors, skipped, files = (content.get(key) for key in ("tensors", "skipped", "files"))
    if (
        not all(isinstance(value, dict) for value in (tensors, skipped, files))
        or not isinstance(content.get("tie_word_embeddings"), bool)
        or not set(tensors.values()) <= set(DTYPES)
    ):
        raise CheckpointError(f"{path} is damaged")
    for name, size in files.items():
        file = os.path.join(directory, name)
        if not os.path.isfile(file):
            raise CheckpointError(f"{directory} is incomplete: {name} is missing")
        if os.path.getsize(file) != size:
            raise CheckpointError(
                f"{directory} is damaged: {name} has {os.path.getsize(file)} bytes, it should have {size}"
            )
    return Manifest(
        source=str(content.get("source")),
        tied=content["tie_word_embeddings"],
        tensors=tensors,
        skipped=skipped,
        files=files,
    )


def is_converted(directory: str) -> bool:
    """Whether a directory is (meant to be) one of ours."""
    return any(os.path.exists(os.path.join(directory, name)) for name in (MANIFEST, PARAMS))


def open_converted(directory: str) -> tuple[ChromaConfig, Manifest]:
    """The configuration (in the dtypes that are stored) and the manifest of one of our directories.

    Raises CheckpointError if it is damaged or incomplete.
    """
    if not os.path.isdir(directory):
        raise CheckpointError(f"no such directory: {directory}")
    if not os.path.exists(os.path.join(directory, MANIFEST)):
        what = "an incomplete" if is_converted(directory) else "no converted"
        raise CheckpointError(f"{directory} is {what} checkpoint: it has no {MANIFEST}")
    manifest = read_manifest(directory)
    cfg = params.with_tied_head(read_config(directory), manifest.tied)
    leaves = [leaf_for(path, leaf.shape) for path, leaf in quantizing.full(cfg).items()]
    names = {name for leaf in leaves for name in leaf.names}
    if names != set(manifest.tensors):
        odd = sorted(names ^ set(manifest.tensors))
        raise CheckpointError(
            f"{directory}: {CONFIG_FILE} and {MANIFEST} disagree on {len(odd)} tensors, the first is {odd[0]}"
        )
    stored = {leaf.path: [DTYPES[manifest.tensors[name]] for name in leaf.names] for leaf in leaves}
    return params.with_stored_dtypes(cfg, stored), manifest


def read_params(directory: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some parameters by path, each in the dtype and sharding asked for. Raises CheckpointError if they are not there."""
    path = literal(os.path.abspath(os.path.join(directory, PARAMS)))
    try:
        with orbax_context():
            metadata = ocp.metadata(path).metadata
            if not isinstance(metadata, Mapping):
                raise CheckpointError(f"{path} is damaged: its metadata cannot be read")
            stored = unnest(metadata)
            for name, want in wanted.items():
                got = tuple(stored[name].shape) if name in stored else "nothing"
                if got != want.shape:
                    raise CheckpointError(
                        f"{path}: {name} should have shape {want.shape}, found {got}"
                    )
            return unnest(ocp.load(path, nest(wanted)))
    except CheckpointError:
        raise
    except (ValueError, OSError, KeyError, TypeError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f"{path} is damaged: {first}") from e


def load_converted(
    directory: str | os.PathLike,
    dtype: str | None = None,
    shardings: Shardings = None,
    stages: Collection[str] | None = None,
    quantize: str | None = None,
) -> tuple[ChromaConfig, ChromaModel]:
    """Loads one of our directories. Arguments, result and errors as those of `load_torch`, with the same numbers.

    Every parameter is read straight into its sharding: each process reads its own part.
    """
    directory = os.path.expanduser(os.fspath(directory))
    held, _ = open_converted(directory)
    cfg = held if dtype is None else held.with_dtype(dtype)
    cfg = quantizing.asked(cfg, quantize, directory)
    abstract, wanted, where = params.model_of(cfg, shardings)
    # What is to be read, as what it is wanted; where it is to be quantised first, as what it is stored.
    stored = wanted if held.quantized else quantizing.full(held)
    read = {path: wanted.get(path, leaf) for path, leaf in stored.items()}
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arrays: dict[str, Any] = dict(wanted)
    sizes = {
        path: read[path].size * read[path].dtype.itemsize for path in params.of_stages(read, stages)
    }
    for group in groups(sizes):
        specs = {
            path: jax.ShapeDtypeStruct(
                read[path].shape,
                read[path].dtype,
                sharding=where[path if path in where else quantizing.parts(path)[0]] or here,
            )
            for path in group
        }
        group = read_params(directory, specs)
        for path in specs:
            array = group.pop(path)  # gone as soon as it is quantised
            arrays |= (
                {path: array}
                if path in wanted
                else quantizing.quantized(path, array, quantize, where)
            )
    return cfg, params.build(abstract, arrays)


class Loaded(NamedTuple):
    """What `load` returns. `directory` holds the tokenizer and the other files beside the weights."""

    config: ChromaConfig
    model: ChromaModel
    directory: str


def load(
    path_or_hub_id: str | os.PathLike,
    dtype: str | None = None,
    shardings: Shardings = None,
    stages: Collection[str] | None = None,
    quantize: str | None = None,
) -> Loaded:
    """Loads a checkpoint, whatever it is: a converted directory, a directory in the Hub's layout, or a Hub id.

    Arguments and errors as those of `load_torch`.
    """
    directory = resolve_source(path_or_hub_id)
    loader = load_converted if is_converted(directory) else load_torch
    return Loaded(*loader(directory, dtype, shardings, stages, quantize), directory)


def save(
    directory: str | os.PathLike,
    cfg: ChromaConfig,
    model: ChromaModel,
    extra_files: Iterable[str | os.PathLike] = (),
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model as a directory that `load` reads and `export` turns into a PyTorch checkpoint.

    With several processes, all of them call it, and the directory is on a file system that they share.

    Args:
      directory: where to.
      cfg: the model's configuration; written as config.json.
      model: the model. Its parameters keep their dtypes.
      extra_files: files to take along under their own names (tokenizer, chat template, preprocessor_config.json).
      overwrite: whether a checkpoint that is there may be replaced.
    """
    arrays = params.flatten(model)
    nbytes = sum(array.size * array.dtype.itemsize for array in arrays.values())
    first = jax.process_index() == 0

    @contextlib.contextmanager
    def target() -> Iterator[str]:
        with staged(directory, overwrite=overwrite, shared=jax.process_count() > 1) as stage:
            check_space(stage, nbytes)
            yield stage

    with by_first(target) as stage:
        with orbax_context():
            ocp.save(literal(os.path.join(stage, PARAMS)), nest(arrays))
        if first:
            for file in extra_files:
                file = paths.expand(file)
                paths.upload(file, os.path.join(stage, os.path.basename(file)))
            config = json.dumps(hf.write(cfg), indent=2)
            paths.at(os.path.join(stage, CONFIG_FILE)).write_text(config)
            whole = quantizing.full(cfg)
            leaves = {path: leaf_for(path, leaf.shape) for path, leaf in whole.items()}
            manifest = Manifest(
                source="saved by chroma_jax",
                tied=cfg.reasoner.tie_embeddings,
                tensors={
                    name: NAMES[np.dtype(arrays.get(path, whole[path]).dtype)]
                    for path, leaf in leaves.items()
                    for name in leaf.names
                },
                skipped={},
                files={},
            )
            write_manifest(stage, manifest)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"chroma_jax.save {os.fspath(directory)}")

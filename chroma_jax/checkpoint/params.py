"""The model's parameters as a flat mapping, path -> array, and the dtypes that its parts are held in.

A path names a parameter as everywhere in this project: "reasoner/llama/layers/attention/q".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from chroma_jax.config import ChromaConfig
from chroma_jax.model.chroma import ChromaModel, abstract_model

# A tree of shardings shaped like the model, a function from the abstract model to such a tree, or one for every leaf.
Shardings = Any

PARAM_DTYPES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}
STAGES = ("reasoner", "backbone", "decoder", "codec")
# The parts that may differ in dtype; the Codec is held in float32 (see ChromaConfig.with_dtype).
_PARTS = ("reasoner/audio_encoder/", "reasoner/", "backbone/", "decoder/")


@functools.lru_cache(maxsize=8)
def abstract(cfg: ChromaConfig) -> ChromaModel:
    """`abstract_model`, remembered: tracing the whole model takes half a second. Not to be changed."""
    return abstract_model(cfg)


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path as "reasoner/llama/norm/scale", whether or not the leaf is wrapped in an nnx.Param."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def flatten(model: ChromaModel) -> dict[str, Any]:
    """Every parameter of a model, concrete or abstract, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.split(model)[1]))
    return {path_name(path): leaf for path, leaf in leaves}


def build(abstract: ChromaModel, arrays: Mapping[str, Any]) -> ChromaModel:
    """The abstract model with these arrays in place of its parameters."""
    graphdef, state = nnx.split(abstract)
    fill = lambda path, _: arrays[path_name(path)]  # noqa: E731
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state)))


def of_stages(paths: Iterable[str], stages: Collection[str] | None) -> list[str]:
    """The paths of the named stages' parameters; None: all of them. Raises ValueError for a stage that does not exist."""
    if stages is None:
        return list(paths)
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        raise ValueError(f"unknown stage {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    return [path for path in paths if path.split("/", 1)[0] in stages]


def is_codec(path: str) -> bool:
    """Whether a parameter belongs to the Codec."""
    return path.startswith("codec/")


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The one dtype that holds all of these exactly: theirs if they agree, float32 otherwise."""
    kinds = set(dtypes)
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def with_stored_dtypes(cfg: ChromaConfig, stored: Mapping[str, Iterable[np.dtype]]) -> ChromaConfig:
    """`cfg` with each part computing and held in the widest dtype that its parameters are stored in.

    Args:
      cfg: the configuration.
      stored: path of each parameter -> the dtypes its tensors have in the files.
    """

    def cast(config, part: str):
        of_part = (d for p, ds in stored.items() if _part(p) == part for d in ds)
        name = PARAM_DTYPES[widest(of_part)]
        return dataclasses.replace(config, dtype=name, param_dtype=name)

    replace, reasoner = dataclasses.replace, cfg.reasoner
    return replace(
        cfg,
        reasoner=replace(
            reasoner, audio=cast(reasoner.audio, _PARTS[0]), text=cast(reasoner.text, _PARTS[1])
        ),
        backbone=replace(cfg.backbone, llama=cast(cfg.backbone.llama, _PARTS[2])),
        decoder=replace(cfg.decoder, llama=cast(cfg.decoder.llama, _PARTS[3])),
    )


def _part(path: str) -> str | None:
    return next((part for part in _PARTS if path.startswith(part)), None)


def with_tied_head(cfg: ChromaConfig, tied: bool) -> ChromaConfig:
    """`cfg` with the Reasoner's head tied to its embedding, or with a head of its own."""
    return dataclasses.replace(cfg, reasoner=dataclasses.replace(cfg.reasoner, tie_embeddings=tied))


def shardings_by_path(
    shardings: Shardings, abstract: ChromaModel
) -> dict[str, jax.sharding.Sharding] | None:
    """`shardings` in whichever form it came, by parameter path; None stays None.

    Raises ValueError if a parameter has no sharding.
    """
    if shardings is None:
        return None
    is_sharding = lambda x: isinstance(x, jax.sharding.Sharding)  # noqa: E731
    if is_sharding(shardings):
        return dict.fromkeys(flatten(abstract), shardings)
    tree = shardings(abstract) if _is_function(shardings) else shardings
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_sharding)
    found = {path_name(path): leaf for path, leaf in leaves}
    missing = [path for path in flatten(abstract) if not is_sharding(found.get(path))]
    if missing:
        raise ValueError(f"no sharding for {len(missing)} parameters, the first is {missing[0]}")
    return found


def _is_function(x: Any) -> bool:
    # A tree may be an nnx.Module, and modules are callable.
    return isinstance(x, Callable) and not isinstance(x, nnx.Module)


def place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """A host array on the devices. With a sharding over several processes, each keeps its own part.

    The host array must not change afterwards: on a CPU the two may share memory.
    """
    if sharding is None:
        # Committed, as what Orbax reads is: a jitted function compiles once for both.
        return jax.device_put(array, jax.local_devices()[0])
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def model_of(
    cfg: ChromaConfig, shardings: Shardings
) -> tuple[ChromaModel, dict[str, jax.ShapeDtypeStruct], dict[str, jax.sharding.Sharding | None]]:
    """The abstract model of `cfg`, its parameters by path, and the sharding of each (None: default device)."""
    model = abstract(cfg)
    wanted = flatten(model)
    return model, wanted, shardings_by_path(shardings, model) or dict.fromkeys(wanted)

"""The table: which PyTorch tensor is which of our parameters; and the plan that it makes of a checkpoint.

The table is read from our side: every parameter of ours names the torch tensors that fill it, one per layer where layers
are stacked. A checkpoint that has exactly these tensors, at the shapes our model wants, is accepted; anything else is
refused before any data is read, with everything that is wrong in one message. Export follows the same plan backwards.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import ml_dtypes
import numpy as np

from chroma_jax.checkpoint.codec_rows import CODEC_ROWS
from chroma_jax.checkpoint.transforms import TRANSFORMS, Row, Shape, Transform

LM_HEAD = "thinker.lm_head.weight"
VISION_TOWER = "thinker.visual."
T = TypeVar("T")
AUDIO_TABLE = "backbone.audio_embedding.embed_audio_tokens.weight"
MAX_PROBLEMS_SHOWN = 5
PARAM_DTYPES = tuple(np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16))


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is for the user and names the file or tensor."""


def _llama_rows(torch: str, ours: str) -> tuple[Row, ...]:
    layer, stack = rf"{torch}\.layers\.(?P<layer>\d+)", f"{ours}/layers"
    return (
        Row(rf"{layer}\.self_attn\.([qkv])_proj\.weight", rf"{stack}/attention/\2", "linear"),
        Row(rf"{layer}\.self_attn\.o_proj\.weight", f"{stack}/attention/o", "linear_in"),
        Row(rf"{layer}\.mlp\.(gate|up|down)_proj\.weight", rf"{stack}/\2", "linear"),
        Row(rf"{layer}\.input_layernorm\.weight", f"{stack}/attention_norm/scale"),
        Row(rf"{layer}\.post_attention_layernorm\.weight", f"{stack}/mlp_norm/scale"),
        Row(rf"{torch}\.norm\.weight", f"{ours}/norm/scale"),
    )


def _norm_rows(torch: str, ours: str) -> tuple[Row, ...]:
    return (Row(rf"{torch}\.weight", f"{ours}/scale"), Row(rf"{torch}\.bias", f"{ours}/bias"))


_TOWER, _EARS = r"thinker\.audio_tower", "reasoner/audio_encoder"
_TOWER_LAYER, _EARS_LAYER = rf"{_TOWER}\.layers\.(?P<layer>\d+)", f"{_EARS}/layers"

ROWS: tuple[Row, ...] = (
    # Reasoner: audio encoder.
    Row(rf"{_TOWER}\.conv([12])\.weight", rf"{_EARS}/conv\1", "conv"),
    Row(rf"{_TOWER}\.conv([12])\.bias", rf"{_EARS}/conv\1_bias"),
    Row(rf"{_TOWER_LAYER}\.self_attn\.([qkv])_proj\.weight", rf"{_EARS_LAYER}/\2", "linear"),
    Row(rf"{_TOWER_LAYER}\.self_attn\.([qv])_proj\.bias", rf"{_EARS_LAYER}/\2_bias", "joined"),
    Row(rf"{_TOWER_LAYER}\.self_attn\.out_proj\.weight", f"{_EARS_LAYER}/o", "linear_in"),
    Row(rf"{_TOWER_LAYER}\.self_attn\.out_proj\.bias", f"{_EARS_LAYER}/o_bias"),
    Row(rf"{_TOWER_LAYER}\.fc1\.weight", f"{_EARS_LAYER}/up", "linear"),
    Row(rf"{_TOWER_LAYER}\.fc1\.bias", f"{_EARS_LAYER}/up_bias"),
    Row(rf"{_TOWER_LAYER}\.fc2\.weight", f"{_EARS_LAYER}/down", "linear"),
    Row(rf"{_TOWER_LAYER}\.fc2\.bias", f"{_EARS_LAYER}/down_bias"),
    *_norm_rows(rf"{_TOWER_LAYER}\.self_attn_layer_norm", f"{_EARS_LAYER}/attention_norm"),
    *_norm_rows(rf"{_TOWER_LAYER}\.final_layer_norm", f"{_EARS_LAYER}/mlp_norm"),
    *_norm_rows(rf"{_TOWER}\.ln_post", f"{_EARS}/norm"),
    Row(rf"{_TOWER}\.proj\.weight", f"{_EARS}/projection", "linear"),
    Row(rf"{_TOWER}\.proj\.bias", f"{_EARS}/projection_bias"),
    Row(rf"{_TOWER}\.audio_bos_eos_token\.weight", f"{_EARS}/unused_bos_eos"),
    # Reasoner: text.
    Row(r"thinker\.model\.embed_tokens\.weight", "reasoner/embedding"),
    Row(re.escape(LM_HEAD), "reasoner/head", "linear"),
    *_llama_rows(r"thinker\.model", "reasoner/llama"),
    Row(
        r"thinker\.model\.layers\.(?P<layer>\d+)\.self_attn\.([qkv])_proj\.bias",
        r"reasoner/llama/layers/attention/\2_bias",
        "joined",
    ),
    # Backbone.
    Row(re.escape(AUDIO_TABLE), "backbone/audio_embedding", "table"),
    Row(r"backbone\.codebook0_head\.weight", "backbone/head", "linear"),
    *_llama_rows(r"backbone\.model", "backbone/llama"),
    # Decoder. Its heads [Q-1, W, V] are applied as matrices there too: no transposition.
    Row(r"decoder\.projection\.weight", "decoder/projection", "linear"),
    Row(r"decoder\.codebook_head\.weight", "decoder/heads"),
    *_llama_rows(r"decoder\.model", "decoder/llama"),
    *CODEC_ROWS,
    # Known, and not part of our model.
    Row(r"thinker\.visual\..*", None, why="the vision tower, which Chroma never uses"),
    Row(
        r"decoder\.audio_embedding\.embed_audio_tokens\.weight",
        None,
        why="the Decoder's copy of the Backbone's audio embedding table",
        same_as=AUDIO_TABLE,
    ),
    Row(
        r".*\.rotary_emb\.(original_)?inv_freq", None, why="rotary frequencies, which are computed"
    ),
    Row(
        r"thinker\.audio_tower\.positional_embedding(\.positional_embedding)?",
        None,
        why="the table of sinusoids, which is computed",
    ),
)

_GROUP = re.compile(r"\((?:\?P<(\w+)>)?((?:[^()\\]|\\.)*)\)")
_REFERENCE = re.compile(r"\\(?:g<(\w+)>|(\d+))")


class _ReversibleRow:
    """A row that also goes from our path to the torch name."""

    def __init__(self, row: Row):
        self.row = row
        groups = list(_GROUP.finditer(row.torch))
        names = [g[1] or str(i) for i, g in enumerate(groups, 1)]
        patterns = dict(zip(names, (g[2] for g in groups), strict=True))
        self.stacked = "layer" in names
        # "thinker\.model\.layers\.(?P<layer>\d+)..." -> "thinker.model.layers.{layer}..."
        pieces, at = [], 0
        for name, group in zip(names, groups, strict=True):
            pieces += [re.sub(r"\\(.)", r"\1", row.torch[at : group.start()]), "{g_" + name + "}"]
            at = group.end()
        self.template = "".join(pieces) + re.sub(r"\\(.)", r"\1", row.torch[at:])
        # "reasoner/llama/layers/\2" -> "reasoner/llama/layers/(?P<g_2>gate|up|down)"
        seen: set[str] = set()
        path, at = "", 0
        for ref in _REFERENCE.finditer(row.path):
            name = ref[1] or ref[2]
            name = names[int(name) - 1] if name.isdigit() else name
            path += re.escape(row.path[at : ref.start()])
            path += f"(?P=g_{name})" if name in seen else f"(?P<g_{name}>{patterns[name]})"
            seen.add(name)
            at = ref.end()
        self.path = re.compile(path + re.escape(row.path[at:]))
        if set(names) - seen - {"layer"}:
            raise ValueError(
                f"row {row.torch!r}: every group but `layer` must appear in path {row.path!r}"
            )

    def torch_names(self, path: str, layers: int) -> tuple[str, ...] | None:
        """The torch names that fill `path`, in layer order; None when this row is not about that path."""
        match = self.path.fullmatch(path)
        if match is None:
            return None
        count = layers if self.stacked else 1
        return tuple(self.template.format(g_layer=i, **match.groupdict()) for i in range(count))


_REVERSIBLE = tuple(_ReversibleRow(row) for row in ROWS if row.path is not None)
_IGNORED = tuple(row for row in ROWS if row.path is None)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of ours and the torch tensors that fill it."""

    path: str
    shape: Shape
    names: tuple[str, ...]
    stacked: bool
    transform: Transform

    @property
    def part_shape(self) -> Shape:
        """Our shape of what one torch tensor fills."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def torch_shape(self) -> Shape:
        return self.transform.torch_shape(self.part_shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a checkpoint's tensors are for.

    `skipped` maps the names that are left out to their rows.
    """

    leaves: tuple[Leaf, ...]
    skipped: Mapping[str, Row]


class TensorLike(Protocol):
    """Anything with a shape and a dtype."""

    shape: Sequence[int]
    dtype: np.dtype


def leaf_for(path: str, shape: Sequence[int]) -> Leaf:
    """The table's entry for one parameter of ours. Raises ValueError unless exactly one row is about it."""
    shape = tuple(shape)
    layers = shape[0] if shape else 0
    found = [(r, names) for r in _REVERSIBLE if (names := r.torch_names(path, layers)) is not None]
    if len(found) != 1:
        raise ValueError(
            f"parameter {path} matches {len(found)} rows of the checkpoint table, wants one"
        )
    ((row, names),) = found
    return Leaf(path, shape, names, row.stacked, TRANSFORMS[row.row.transform])


def ignored_row(name: str) -> Row | None:
    """The row that says why this torch tensor is left out, if one does."""
    return next((row for row in _IGNORED if re.fullmatch(row.torch, name)), None)


def is_known(name: str) -> bool:
    """Whether a row, for any size of model, is about this torch tensor."""
    return any(re.fullmatch(row.torch, name) for row in ROWS)


# What PyTorch's wrappers put into the names of what they wrap: compilation, DataParallel and its kin, FSDP.
_WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.)+|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module)\."
)


def under_table_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors under the names that the table knows: unwrapped, and a copy in the place of its original where that is missing.

    (transformers keeps one of two tied tensors: the Hub's file has the Backbone's, the public code saves the Decoder's.)
    Raises CheckpointError if two tensors would get one name.
    """
    named: dict[str, T] = {}
    for old, tensor in tensors.items():
        name = _WRAPPERS.sub("", old)
        if name in named:
            raise CheckpointError(f"two tensors are {name}, one of them as {old}")
        named[name] = tensor
    for name in list(named):
        row = ignored_row(name)
        if row is not None and row.same_as and row.same_as not in named:
            named[row.same_as] = named.pop(name)
    return named


def make_plan(
    tensors: Mapping[str, TensorLike], params: Mapping[str, TensorLike], what: str = "checkpoint"
) -> Plan:
    """Assigns every torch tensor to one parameter of ours, or to a reason for leaving it out.

    Args:
      tensors: torch name -> what the checkpoint has.
      params: our path -> what the model wants; its dtype does not matter here.
      what: names the checkpoint in messages.

    Raises CheckpointError that lists every unknown tensor, missing tensor, wrong shape and unusable dtype.
    """
    leaves = tuple(leaf_for(path, param.shape) for path, param in params.items())
    skipped = {name: row for name in tensors if (row := ignored_row(name)) is not None}
    raise_problems(what, list(_problems(tensors, leaves, skipped)))
    return Plan(leaves, skipped)


def _problems(
    tensors: Mapping[str, TensorLike], leaves: Sequence[Leaf], skipped: Mapping[str, Row]
) -> Iterator[str]:
    wanted: dict[str, Leaf] = {}
    for leaf in leaves:
        for name in leaf.names:
            if name in wanted or name in skipped:
                raise ValueError(f"the checkpoint table uses {name} twice")
            wanted[name] = leaf
    for name, leaf in wanted.items():
        if name not in tensors:
            yield f"missing tensor {name} {list(leaf.torch_shape)}"
        elif tuple(tensors[name].shape) != leaf.torch_shape:
            got, want = list(tensors[name].shape), list(leaf.torch_shape)
            yield f"tensor {name} has shape {got}, but the config wants {want}"
        elif tensors[name].dtype not in PARAM_DTYPES:
            yield f"tensor {name} has dtype {tensors[name].dtype}; float32, float16 or bfloat16 is wanted"
    for name in tensors:
        if name in skipped:
            continue
        if name not in wanted:
            why = (
                "not part of the model that the config describes"
                if is_known(name)
                else "no part of Chroma"
            )
            yield f"unknown tensor {name}: {why}"


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raises one CheckpointError for all problems (one line if there is one), or returns if there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise CheckpointError(f"{what}: {problems[0]}")
    lines = [f"{what}: {len(problems)} problems with its tensors:", *problems[:MAX_PROBLEMS_SHOWN]]
    if len(problems) > MAX_PROBLEMS_SHOWN:
        lines.append(f"... and {len(problems) - MAX_PROBLEMS_SHOWN} more")
    raise CheckpointError("\n  ".join(lines))

"""One training step: float32 master weights in, cast, losses, gradients, AdamW, out. Pure, jitted once, on any mesh.

What trains (`TrainState.params`) and what is frozen are separate arguments. Frozen parameters get no gradients and no moments
and are not donated. Both are nested dictionaries by path: params["backbone"]["llama"]["norm"]["scale"].

Axes: B batch, N prompt tokens, L answer tokens, T frames, K drawn frames, Q codebooks, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax import sharding
from chroma_jax.checkpoint import params as parameters
from chroma_jax.checkpoint.store import nest, unnest
from chroma_jax.config import ChromaConfig
from chroma_jax.data import batch as batches
from chroma_jax.data.batch import Batch
from chroma_jax.model.chroma import ChromaModel, abstract_model
from chroma_jax.training import lora, losses, optim, selection
from chroma_jax.training.config import TEXT, TrainConfig

# By default XLA cuts the gathering of a weight into windows and multiplies by each as it comes. Sixteen windows of a contraction
# over 1024 or 2048 leave products too thin for the matrix units: with whole gathers, which the scheduler overlaps, the
# compiler's estimate for the published model on v5e:4x4 falls from 763 to 287 ms.
_TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # [] int32, steps done
    params: dict[str, Any]  # trained parameters, float32, nested by path
    opt_state: optax.OptState


class Placement(NamedTuple):
    """Where a step's arguments live: trees of NamedSharding, and one for every leaf of a batch."""

    state: TrainState
    frozen: dict[str, Any]
    batch: NamedSharding


def build(cfg: ChromaConfig, train_cfg: TrainConfig, mesh: Mesh | None = None) -> Trainer:
    """Everything that one stage of training runs.

    Args:
      cfg: the model.
      train_cfg: the stage.
      mesh: instead of `train_cfg.mesh` over all devices (devices of a machine that is not here, say).

    Raises:
      ValueError: the mesh does not divide devices or parameters; rules that do not cover every parameter exactly once, or
        train what the objective does not reach; LoRA rules without `lora`, or the reverse; a quantised model.
    """
    if mesh is None and train_cfg.mesh is not None:
        mesh = sharding.make_mesh(train_cfg.mesh)
    return Trainer(cfg, train_cfg, mesh)


def reasoner_states(model: ChromaModel, batch: Batch) -> jax.Array:
    """The Reasoner over question and answer, teacher-forced: its state [B, L, D] before each answer token."""
    features = None
    if batch.chunks.shape[1]:
        features = model.reasoner.encode_audio(batch.chunks, batch.chunk_lengths)
    states = model.reasoner(batch.prompt_ids, features)
    at = batch.prompt_lengths[:, None] - 1 + jnp.arange(batch.text.shape[1])
    at = jnp.clip(at, 0, states.shape[1] - 1)
    return jnp.take_along_axis(states, at[..., None], axis=1)


class Trainer:
    """See `build`. Methods are pure; the object holds configuration and compiled functions only.

    Attributes:
      cfg: the model in the dtypes of training; models from `model_of` carry it.
      train_cfg: the stage.
      mesh: the mesh, or None.
      selection: which parameters train.
      shardings: `Placement`, or None without a mesh.
    """

    def __init__(self, cfg: ChromaConfig, train_cfg: TrainConfig, mesh: Mesh | None):
        if cfg.quantized is not None:
            raise ValueError(
                f"a model quantised to {cfg.quantized} cannot be trained; start from the checkpoint that it was made from"
            )
        self.train_cfg, self.mesh = train_cfg, mesh
        self.cfg = _in_training_dtypes(cfg, train_cfg)
        self._held = abstract_model(self.cfg)
        self._computing = abstract_model(_with_remat(self.cfg, train_cfg))
        self._shapes = parameters.flatten(self._held)
        self.selection = selection.select(train_cfg.trains, self._shapes)
        selection.check_objective(self.selection, train_cfg.objective)
        self._kernels = self.selection.paths(selection.LORA)
        if self._kernels and train_cfg.lora is None:
            raise ValueError(f"{self._kernels[0]} is under a lora rule, but lora is not configured")
        if train_cfg.lora is not None and not self._kernels:
            raise ValueError("lora is configured, but no rule says lora")
        self._optimizer = optim.make_optimizer(train_cfg.optimizer)
        state, frozen = jax.eval_shape(lambda: self._init(jax.random.key(0)))
        self.shardings, self._rows = None, None
        jit, jit_step, jit_eval = {}, {}, {}
        if mesh is not None:
            self._rows = NamedSharding(mesh, sharding.ROWS)
            self.shardings = Placement(
                sharding.shardings(state, mesh), sharding.shardings(frozen, mesh), self._rows
            )
            replicated = NamedSharding(mesh, P())
            place = self.shardings
            jit = dict(out_shardings=(place.state, place.frozen))
            jit_step = dict(in_shardings=tuple(place), out_shardings=(place.state, replicated))
            jit_eval = dict(in_shardings=tuple(place), out_shardings=replicated)
            if mesh.devices.flat[0].platform == "tpu":
                jit_step["compiler_options"] = jit_eval["compiler_options"] = _TPU_OPTIONS
        self._jit_init = jax.jit(self._init, **jit)
        self._jit_start = jax.jit(
            self._start, **(dict(out_shardings=self.shardings.state) if mesh is not None else {})
        )
        self._jit_train = jax.jit(self._train, donate_argnums=0, **jit_step)
        self._jit_eval = jax.jit(self._eval, **jit_eval)
        self._jit_merge = jax.jit(
            lambda kernels, factors: lora.merge(train_cfg.lora, kernels, factors)
        )

    # --- before the first step ---

    def init(self, key: jax.Array | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Random parameters, made where they belong: (state, frozen). Default key: that of the configuration's seed."""
        return self._jit_init(jax.random.key(self.train_cfg.seed) if key is None else key)

    def from_model(self, model: ChromaModel) -> tuple[TrainState, dict[str, Any]]:
        """A model's parameters in the dtypes of training: (state, frozen). The model stays usable.

        Frozen parameters share its memory where dtype and place agree.

        Raises:
          ValueError: a parameter is missing or has another shape.
        """
        arrays = parameters.flatten(model)
        for path, leaf in self._shapes.items():
            got = tuple(arrays[path].shape) if path in arrays else "nothing"
            if got != tuple(leaf.shape):
                raise ValueError(f"{path} should have shape {tuple(leaf.shape)}, got {got}")
        frozen, trained = {}, {}
        for path, leaf in self._shapes.items():
            where = None
            if self.mesh is not None:
                spec = sharding.spec_of(path, leaf.shape, self.mesh)
                where = NamedSharding(self.mesh, spec)
            array = arrays[path]
            array = array if array.dtype == leaf.dtype else array.astype(leaf.dtype)
            kept = self.selection.what[path] != selection.TRAIN
            (frozen if kept else trained)[path] = (
                array if where is None else jax.device_put(array, where)
            )
        # Trained parameters are copied: the step donates its state, and the model is not ours to destroy.
        state = self._jit_start(trained, jax.random.key(self.train_cfg.seed))
        return state, nest(frozen)

    def abstract(self) -> tuple[TrainState, dict[str, Any]]:
        """(state, frozen) as shapes, with shardings where there is a mesh: what a checkpoint is restored into."""
        shapes = jax.eval_shape(lambda: self._init(jax.random.key(0)))
        if self.shardings is None:
            return shapes
        place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        return jax.tree.map(place, shapes, (self.shardings.state, self.shardings.frozen))

    def summary(self) -> str:
        """What trains and what does not, as a table."""
        state, frozen = self.abstract()
        return selection.summary(self.selection, unnest(frozen), unnest(state.params))

    # --- steps ---

    def put(self, batch: Batch) -> Batch:
        """A host batch on the devices: each process gives its own rows, in the order of the processes.

        Raises:
          ValueError: fields that do not fit each other, or rows that mesh and accumulation do not divide.
        """
        if isinstance(batch.frames, jax.Array):
            return batch
        batches.check(batch)
        self.check_hidden(batch.hidden is not None)
        self.check_rows(batch.rows * jax.process_count())
        batch = batch.needed()
        if self._rows is None:
            return jax.tree.map(jnp.asarray, batch)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._rows, np.asarray(x)), batch
        )

    def train_step(
        self, state: TrainState, frozen: dict[str, Any], batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update. `state` is donated: it cannot be used afterwards.

        Metrics are scalars: those of `losses.metrics` (or `losses.text_metrics`), grad_norm (before clipping), learning_rate, and `finite`. A step whose
        loss or gradient is not finite changes nothing but says so: finite is False.
        """
        batch = self.put(batch)
        with self._on_mesh():
            return self._jit_train(state, frozen, batch)

    def eval_step(
        self, state: TrainState, frozen: dict[str, Any], batch: Batch
    ) -> dict[str, jax.Array]:
        """The metrics of `losses.metrics` on a batch, over all frames, or `losses.text_metrics`. Weigh batches by "frames" or "text_tokens"."""
        batch = self.put(batch)
        with self._on_mesh():
            return self._jit_eval(state, frozen, batch)

    def model_of(self, state: TrainState, frozen: dict[str, Any]) -> ChromaModel:
        """The whole model, LoRA merged, for generation or saving. It shares the state's memory: use it before the next step."""
        params, arrays = unnest(state.params), unnest(frozen)
        if self._kernels:
            arrays |= self._jit_merge({path: arrays[path] for path in self._kernels}, params)
            params = {}
        return parameters.build(self._held, arrays | params)

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The step lowered for a batch of arrays or shapes, without any parameters."""
        self.check_rows(batch.frames.shape[0])
        state, frozen = self.abstract()
        with self._on_mesh():
            return self._jit_train.lower(state, frozen, batch.needed())

    @property
    def compilations(self) -> int:
        """How often the training step was compiled: once per shape of batch."""
        return self._jit_train._cache_size()

    # --- inside jit ---

    def _init(self, key):
        model = ChromaModel(self.cfg, rngs=nnx.Rngs(key))
        arrays = parameters.flatten(model)
        trained = {path: arrays.pop(path) for path in self.selection.paths(selection.TRAIN)}
        return self._start(trained, key), nest(arrays)

    def _start(self, trained, key):
        params = {path: jnp.copy(array) for path, array in trained.items()}
        if self._kernels:
            shapes = {path: self._shapes[path].shape for path in self._kernels}
            params |= lora.init(self.train_cfg.lora, shapes, key)
        params = nest(params)
        return TrainState(jnp.zeros((), jnp.int32), params, self._optimizer.init(params))

    def _model(self, params, frozen):
        """The model that computes: LoRA merged, master weights cast before they are gathered."""
        arrays, trained = unnest(frozen), unnest(params)
        if self._kernels:
            kernels = {path: arrays[path] for path in self._kernels}
            arrays |= lora.merge(self.train_cfg.lora, kernels, trained)
        else:
            arrays |= trained
        dtype = self.train_cfg.compute_dtype

        def cast(path, array):
            # The Codec is not run; norms are computed in float32 and take their scales so.
            whole = path.startswith("codec/") or path.endswith("scale")
            return array if whole else array.astype(dtype)

        return parameters.build(self._computing, {p: cast(p, a) for p, a in arrays.items()})

    def _sums(self, params, frozen, batch, draw):
        model = self._model(params, frozen)
        hidden = reasoner_states(model, batch) if batch.hidden is None else batch.hidden
        if self.train_cfg.objective == TEXT:
            return losses.text_sums(model.reasoner.logits(hidden), batch.text, batch.text_lengths)
        # The Reasoner is frozen: nothing to differentiate.
        return losses.dialogue_sums(model, batch.dialogue(jax.lax.stop_gradient(hidden)), draw)

    def _count(self, batch, draw):
        """What the loss of a whole batch is the mean over: frames per codebook [Q], or tokens [1]."""
        if self.train_cfg.objective == TEXT:
            return batch.text_lengths.sum()[None].astype(jnp.float32)
        counts = losses.valid_frames(batch.frame_lengths, batch.frames.shape[1]).sum()
        drawn = counts if draw is None else draw.counts.sum()
        books = jnp.arange(batch.frames.shape[2])
        return jnp.where(books == 0, counts, drawn).astype(jnp.float32)

    def _share(self, sums, count):
        """A microbatch's share of the loss."""
        if self.train_cfg.objective == TEXT:
            return losses.text_share(sums, count)
        return losses.weighted(sums, count, self.train_cfg.decoder_weight)

    def _metrics(self, sums):
        if self.train_cfg.objective == TEXT:
            return losses.text_metrics(sums)
        return losses.metrics(sums, self.train_cfg.decoder_weight)

    def _train(self, state, frozen, batch):
        cfg = self.train_cfg
        draw = self._draw(state.step, batch)
        count = self._count(batch, draw)

        def share(params, batch, draw):
            sums = self._sums(params, frozen, batch, draw)
            return self._share(sums, count), sums

        gradient = jax.grad(share, has_aux=True)
        if cfg.accumulation == 1:
            grads, sums = gradient(state.params, batch, draw)
        else:

            def add(total, part):
                return jax.tree.map(jnp.add, total, gradient(state.params, *part)), None

            zero = losses.Sums(*(jnp.zeros_like(count) for _ in losses.Sums._fields))
            start = (jax.tree.map(jnp.zeros_like, state.params), zero)
            (grads, sums), _ = jax.lax.scan(add, start, self._microbatches((batch, draw)))

        metrics = self._metrics(sums)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        rate = optim.learning_rate(cfg.optimizer)(state.step)
        return new, metrics | dict(grad_norm=grad_norm, learning_rate=rate, finite=finite)

    def _eval(self, state, frozen, batch):
        return self._metrics(self._sums(state.params, frozen, batch, None))

    def _draw(self, step, batch):
        """Frames for the Decoder's loss, drawn for the whole batch: the same whatever the accumulation or the mesh."""
        fraction = self.train_cfg.decoder_fraction
        if fraction == 1 or self.train_cfg.objective == TEXT:
            return None
        key = jax.random.fold_in(jax.random.key(self.train_cfg.seed), step)
        return losses.draw_frames(key, batch.frame_lengths, batch.frames.shape[1], fraction)

    def _microbatches(self, tree):
        """[B, ...] -> [A, B / A, ...]; a microbatch takes every A-th row, so that rows stay on their devices."""

        def split(x):
            x = x.reshape(-1, self.train_cfg.accumulation, *x.shape[1:]).swapaxes(0, 1)
            return sharding.constrain(x, P(None, sharding.ROW_AXES))

        return jax.tree.map(split, tree)

    # --- checks and context ---

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def check_rows(self, rows: int) -> None:
        """Raises ValueError unless mesh and accumulation divide the rows of a batch."""
        parts, accumulation = sharding.row_shards(self.mesh), self.train_cfg.accumulation
        if rows == 0 or rows % (parts * accumulation):
            raise ValueError(
                f"a batch of {rows} rows must be a multiple of {parts * accumulation}: "
                f"{parts} shards of rows (mesh data x fsdp) times accumulation {accumulation}"
            )

    def check_hidden(self, precomputed: bool) -> None:
        """Raises ValueError for Reasoner states computed beforehand where the Reasoner trains."""
        if precomputed and self.train_cfg.objective == TEXT:
            raise ValueError(
                f"objective {TEXT!r} trains the Reasoner, but the data holds Reasoner states computed beforehand: prepare it "
                "without --precompute_hidden"
            )


def _in_training_dtypes(cfg: ChromaConfig, train_cfg: TrainConfig) -> ChromaConfig:
    """`cfg` computing in compute_dtype, the frozen Reasoner held in reasoner_dtype, what trains in float32."""
    held = cfg.with_dtype(train_cfg.compute_dtype, "float32")
    if train_cfg.objective == TEXT:
        return held
    reasoner = cfg.with_dtype(train_cfg.compute_dtype, train_cfg.reasoner_dtype).reasoner
    return dataclasses.replace(held, reasoner=reasoner)


def _with_remat(cfg: ChromaConfig, train_cfg: TrainConfig) -> ChromaConfig:
    """`cfg` with what trains rematerialised; the rest has no gradient to keep anything for."""
    replace, remat = dataclasses.replace, train_cfg.remat
    if train_cfg.objective == TEXT:
        text = replace(cfg.reasoner.text, remat=remat)
        return replace(cfg, reasoner=replace(cfg.reasoner, text=text))
    return replace(
        cfg,
        backbone=replace(cfg.backbone, llama=replace(cfg.backbone.llama, remat=remat)),
        decoder=replace(cfg.decoder, llama=replace(cfg.decoder.llama, remat=remat)),
    )

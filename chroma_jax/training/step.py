"""One training step: float32 master weights in, cast, losses, gradients, AdamW, out. Pure, jitted once, on any mesh.

What trains (`TrainState.params`) and what is frozen are separate arguments. Frozen parameters get no gradients and no moments
and are not donated. Both are nested dictionaries by path: params["backbone"]["llama"]["norm"]["scale"].

Axes: B batch, N prompt tokens, L answer tokens, T frames, K drawn frames, Q codebooks, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
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
from chroma_jax.training import lora, optim, selection
from chroma_jax.training.config import TrainConfig
from chroma_jax.training.objectives import make_objective

# By default XLA cuts the gathering of a weight into windows and multiplies by each as it comes. Sixteen windows of a contraction
# over 1024 or 2048 leave products too thin for the matrix units: with whole gathers, which the scheduler overlaps, the
# compiler's estimate for the published model on v5e:4x4 falls from 763 to 287 ms.
_TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # [] int32, steps done
    params: dict[str, Any]  # parameters that gradients train, float32, nested by path
    opt_state: optax.OptState
    averages: dict[str, Any]  # parameters that follow averages of what the model computes, likewise


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
        self.train_cfg, self.mesh = train_cfg, mesh
        self.objective = make_objective(cfg, train_cfg)
        self.cfg = self.objective.cfg
        self._held = nnx.eval_shape(lambda: self.objective.model(nnx.Rngs(0)))
        self._computing = nnx.eval_shape(lambda: self.objective.computing(nnx.Rngs(0)))
        self._shapes = parameters.flatten(self._held)
        self.selection = selection.select(train_cfg.trains, self._shapes)
        selection.check_reached(self.selection, train_cfg.objective, self.objective.stages)
        self._kernels = self.selection.paths(selection.LORA)
        if self._kernels and train_cfg.lora is None:
            raise ValueError(f"{self._kernels[0]} is under a lora rule, but lora is not configured")
        if train_cfg.lora is not None and not self._kernels:
            raise ValueError("lora is configured, but no rule says lora")
        self._optimizer = self.objective.optimizer()
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
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        if platform == "cpu":
            # The program that draws each parameter runs once: to optimise it takes minutes and gains nothing.
            jit["compiler_options"] = {"xla_backend_optimization_level": 0}
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

    def from_model(self, model: nnx.Module) -> tuple[TrainState, dict[str, Any]]:
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
        frozen, trained, averaged = {}, {}, {}
        into = {selection.TRAIN: trained, selection.AVERAGE: averaged}
        for path, leaf in self._shapes.items():
            where = None
            if self.mesh is not None:
                spec = sharding.spec_of(path, leaf.shape, self.mesh)
                where = NamedSharding(self.mesh, spec)
            array = arrays[path]
            array = array if array.dtype == leaf.dtype else array.astype(leaf.dtype)
            into.get(self.selection.what[path], frozen)[path] = (
                array if where is None else jax.device_put(array, where)
            )
        # Trained parameters are copied: the step donates its state, and the model is not ours to destroy.
        state = self._jit_start(trained, averaged, jax.random.key(self.train_cfg.seed))
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

    def prepare(
        self,
        state: TrainState,
        frozen: dict[str, Any],
        step: int,
        read: Callable[[int], Any],
    ) -> TrainState:
        """The state as step `step` wants it, which is another one at few steps: see `Objective.preparations`.

        A function of state, step and data: a run that is resumed here prepares again, and gets the same.

        Args:
          state: before the step.
          frozen: what does not train.
          step: its number, from 0.
          read: number -> the host's rows of that training batch.
        """
        for work in self.objective.preparations(step):
            replicated = None if self.mesh is None else NamedSharding(self.mesh, P())
            gather = jax.jit(
                lambda state, frozen, batch, work=work: work.gather(
                    self._model(state.params, state.averages, frozen), batch
                ),
                out_shardings=replicated,
            )
            finish = jax.jit(
                lambda state, frozen, seen, work=work: self._changed(
                    state, work.finish(self._model(state.params, state.averages, frozen), seen)
                ),
                out_shardings=None if self.mesh is None else self.shardings.state,
            )
            with self._on_mesh():
                seen = [gather(state, frozen, self.put(read(n))) for n in range(work.batches)]
                state = finish(state, frozen, seen)
        return state

    # --- steps ---

    def put(self, batch: Any) -> Any:
        """A host batch on the devices: each process gives its own rows, in the order of the processes.

        Raises:
          ValueError: fields that do not fit each other, or rows that mesh and accumulation do not divide.
        """
        if isinstance(jax.tree.leaves(batch)[0], jax.Array):
            return batch
        self.objective.check(batch)
        self.check_rows(batch.rows * jax.process_count())
        batch = batch.needed()
        if self._rows is None:
            return jax.tree.map(jnp.asarray, batch)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._rows, np.asarray(x)), batch
        )

    def train_step(
        self, state: TrainState, frozen: dict[str, Any], batch: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update. `state` is donated: it cannot be used afterwards.

        Metrics are scalars: the objective's, grad_norm (before clipping), learning_rate, and `finite`. A step whose
        loss or gradient is not finite changes nothing but says so: finite is False.
        """
        batch = self.put(batch)
        with self._on_mesh():
            return self._jit_train(state, frozen, batch)

    def eval_step(
        self, state: TrainState, frozen: dict[str, Any], batch: Any
    ) -> dict[str, jax.Array]:
        """The objective's metrics on a batch, nothing drawn. Weigh batches by "frames" or "text_tokens"."""
        batch = self.put(batch)
        with self._on_mesh():
            return self._jit_eval(state, frozen, batch)

    def model_of(self, state: TrainState, frozen: dict[str, Any]) -> Any:
        """The whole model (a ChromaModel, or what the objective trains), LoRA merged, for generation or saving.

        It shares the state's memory: use it before the next step.
        """
        params, arrays = unnest(state.params), unnest(frozen) | unnest(state.averages)
        if self._kernels:
            arrays |= self._jit_merge({path: arrays[path] for path in self._kernels}, params)
            params = {}
        return parameters.build(self._held, arrays | params)

    def lower(self, batch: Any) -> jax.stages.Lowered:
        """The step lowered for a batch of arrays or shapes, without any parameters."""
        self.check_rows(batch.rows)
        state, frozen = self.abstract()
        with self._on_mesh():
            return self._jit_train.lower(state, frozen, batch.needed())

    @property
    def compilations(self) -> int:
        """How often the training step was compiled: once per shape of batch."""
        return self._jit_train._cache_size()

    # --- inside jit ---

    def _init(self, key):
        arrays = parameters.flatten(self.objective.model(nnx.Rngs(key)))
        trained, averaged = (
            {path: arrays.pop(path) for path in self.selection.paths(kind)}
            for kind in (selection.TRAIN, selection.AVERAGE)
        )
        return self._start(trained, averaged, key), nest(arrays)

    def _start(self, trained, averaged, key):
        params = {path: jnp.copy(array) for path, array in trained.items()}
        if self._kernels:
            shapes = {path: self._shapes[path].shape for path in self._kernels}
            params |= lora.init(self.train_cfg.lora, shapes, key)
        params = nest(params)
        averages = nest({path: jnp.copy(array) for path, array in averaged.items()})
        return TrainState(jnp.zeros((), jnp.int32), params, self._optimizer.init(params), averages)

    def _model(self, params, averages, frozen):
        """The model that computes: LoRA merged, master weights cast before they are gathered."""
        arrays, trained = unnest(frozen) | unnest(averages), unnest(params)
        if self._kernels:
            kernels = {path: arrays[path] for path in self._kernels}
            arrays |= lora.merge(self.train_cfg.lora, kernels, trained)
        else:
            arrays |= trained
        cast = self.objective.cast
        return parameters.build(self._computing, {p: cast(p, a) for p, a in arrays.items()})

    @staticmethod
    def _changed(state, arrays):
        """The state with these parameters in place of its own; those that it does not have are frozen, and stay."""
        params, averages = (
            nest({p: arrays.get(p, a) for p, a in unnest(tree).items()})
            for tree in (state.params, state.averages)
        )
        return state._replace(params=params, averages=averages)

    def _sums(self, params, averages, frozen, batch, draw):
        return self.objective.sums(self._model(params, averages, frozen), batch, draw)

    def _train(self, state, frozen, batch):
        cfg = self.train_cfg
        objective = self.objective
        draw = objective.draw(state.step, batch)
        count = objective.count(batch, draw)

        def share(params, batch, draw):
            sums = self._sums(params, state.averages, frozen, batch, draw)
            return objective.share(sums, count), sums

        gradient = jax.grad(share, has_aux=True)
        if cfg.accumulation == 1:
            grads, sums = gradient(state.params, batch, draw)
        else:

            def add(total, part):
                return jax.tree.map(jnp.add, total, gradient(state.params, *part)), None

            parts = self._microbatches((batch, draw))
            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(gradient, state.params, *first)
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add, zero, parts)

        metrics = objective.metrics(sums)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averages = nest(objective.follow(unnest(state.averages), sums, state.step))
        new = TrainState(state.step + 1, params, opt_state, averages)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        rate = optim.learning_rate(cfg.optimizer)(state.step)
        return new, metrics | dict(grad_norm=grad_norm, learning_rate=rate, finite=finite)

    def _eval(self, state, frozen, batch):
        sums = self._sums(state.params, state.averages, frozen, batch, None)
        return self.objective.metrics(sums)

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

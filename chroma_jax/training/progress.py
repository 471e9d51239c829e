"""What a run tells while it goes: a line on the console per interval, and scalars, sound and text for TensorBoard, by tensorboardX."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from chroma_jax import paths
from chroma_jax.cost.tpu import CHIPS
from chroma_jax.training.samples import Sample
from chroma_jax.training.tensorboard import Board

# What makers publish: bfloat16 operations per second of one device, dense. The first name that a device's kind begins with counts.
PEAKS = {
    "TPU v4 lite": None,
    "TPU v4": CHIPS["v4"].peak,
    "TPU v5 lite": CHIPS["v5e"].peak,
    "TPU v5e": CHIPS["v5e"].peak,
    "TPU v5": CHIPS["v5p"].peak,
    "TPU v6": CHIPS["v6e"].peak,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
# Metrics that are sums; the first one there weighs the others.
COUNTS = ("frames", "text_tokens", "decoder_frames")
NO_TENSORBOARD = "tensorboardX is not installed: nothing for TensorBoard (pip install tensorboardX)"


def mean(metrics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of several batches as one: weighted by their frames or text tokens; `COUNTS` are added up."""
    metrics = jax.device_get(list(metrics))
    counts = [key for key in COUNTS if key in metrics[0]]
    weights = np.array([m[counts[0]] for m in metrics], np.float64)
    weights /= max(weights.sum(), 1.0)
    # A batch without any may hold anything.
    one = {
        key: float(sum(w * float(m[key]) for w, m in zip(weights, metrics, strict=True) if w))
        for key in metrics[0]
    }
    for key in counts:
        one[key] = float(sum(m[key] for m in metrics))
    return one


def peak(device_kind: str) -> float | None:
    """Published bfloat16 operations per second of a device that calls itself so, or None."""
    return next((p for name, p in PEAKS.items() if device_kind.startswith(name)), None)


class Progress:
    """Gathers the metrics of steps and reports them. Every process has one and calls it alike; one of them speaks and writes.

    Per interval: seconds per step, frames per second (of answers), tokens per second (the objective's `positions`), the share of time spent waiting
    for data, and the operations per second and device that the model needs (`flops.StepFlops`): as model FLOPs utilisation
    (MFU), a share of the device's `peak`, where that is known. Steps that were compiled for are not timed.

    Args:
      steps: of the whole run.
      say: told each line.
      folder: of TensorBoard's files; None for none.
      describe: metrics in short, as the objective tells them.
      step: steps done before; what TensorBoard's files hold beyond it is hidden.
      devices: that the step runs on.
    """

    def __init__(
        self,
        steps: int,
        say: Callable[[str], None],
        folder: str | None,
        describe: Callable[[Mapping[str, float]], str],
        step: int = 0,
        devices: Sequence[jax.Device] = (),
    ):
        self._steps, self._say, self._describe = steps, say, describe
        self._devices = list(devices) or jax.devices()[:1]
        self._peak = peak(self._devices[0].device_kind)
        self._folder = folder
        self._board = None if folder is None else self._try(Board, folder, step)
        self._first = True
        self._restart()

    def add(
        self,
        metrics: Mapping[str, jax.Array],
        began: float,
        waited: float,
        *,
        flops: int,
        tokens: int,
        compiled: bool,
    ) -> None:
        """A step was given to the devices.

        Args:
          metrics: of the step.
          began: `time.monotonic()` when its data was asked for.
          waited: seconds until they were there.
          flops: operations that it needs, over all processes.
          tokens: positions of this process's rows.
          compiled: whether it had to be compiled for.
        """
        self._metrics.append(metrics)
        if compiled:  # told apart from what a step takes
            jax.block_until_ready(metrics["loss"])
            took = time.monotonic() - began
            what = "first step" if self._first else "a batch of another shape"
            self._say(f"{what}: {took:.1f} s, compilation included")
            self._first = False
            self._began += took
            return
        self._timed.append(metrics)
        self._waited += waited
        self._flops += flops
        self._tokens += tokens

    def pause(self, seconds: float) -> None:
        """Not counted as time of steps."""
        self._began += seconds

    def report(self, step: int) -> dict[str, float]:
        """Tells the interval that ends with `step`."""
        shown = mean(self._metrics)  # waits for the devices
        seconds = time.monotonic() - self._began
        line = f"step {step}/{self._steps}  {self._describe(shown)}"
        if self._timed:
            speed = self._speed(seconds)
            line += f"  {_describe_speed(speed)}"
            shown |= speed
        self._say(line)
        self._write("train", step, shown)
        self._restart()
        return shown

    def evaluation(self, step: int, shown: Mapping[str, float]) -> None:
        """Tells the result of held-out records."""
        self._say(f"step {step}/{self._steps}  held out: {self._describe(shown)}")
        self._write("evaluation", step, shown)

    def samples(self, step: int, samples: Sequence[Sample], rate: int) -> None:
        """Tells the sample replies of a step."""
        for number, sample in enumerate(samples):
            self._say(f"step {step}/{self._steps}  reply to {sample.describe(rate)}")
            self._sound(f"sample_{number}/reply", step, sample, rate)
            if sample.same_frames is not None:
                self._write(f"sample_{number}", step, {"same_frames": sample.same_frames})

    def recorded(self, step: int, samples: Sequence[Sample], rate: int) -> None:
        """Puts the records' own answers beside the replies, for TensorBoard."""
        for number, sample in enumerate(samples):
            self._sound(f"sample_{number}/record", step, sample, rate)

    def close(self) -> None:
        """Writes out what is waiting."""
        if self._board is not None:
            self._try(self._board.close)

    def _restart(self) -> None:
        self._metrics: list[Mapping[str, jax.Array]] = []
        self._timed: list[Mapping[str, jax.Array]] = []
        self._began, self._waited = time.monotonic(), 0.0
        self._flops, self._tokens = 0, 0

    def _speed(self, seconds: float) -> dict[str, float]:
        tokens = self._tokens
        if jax.process_count() > 1:
            tokens = multihost_utils.process_allgather(np.float64(tokens)).sum()
        per_device = self._flops / seconds / len(self._devices)
        speed = {
            "seconds_per_step": seconds / len(self._timed),
            "tokens_per_second": float(tokens / seconds),
            "tflops_per_second_per_device": per_device / 1e12,
            "data_wait": self._waited / seconds,
        }
        done = mean(self._timed)
        if "frames" in done:
            speed["frames_per_second"] = done["frames"] / seconds
        return speed if self._peak is None else speed | {"mfu": per_device / self._peak}

    def _sound(self, tag: str, step: int, sample: Sample, rate: int) -> None:
        if self._board is not None and sample.audio is not None and len(sample.audio):
            self._try(self._board.sound, tag, step, sample.audio, rate)
        if self._board is not None:
            self._try(self._board.text, f"{tag}_text", step, sample.text)

    def _write(self, prefix: str, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            self._try(self._board.scalars, prefix, step, values)

    def _try(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls something of TensorBoard's; that it fails is said, ends nothing, and is the last of it."""
        try:
            return function(*args)
        except ImportError:
            self._say(NO_TENSORBOARD)
        except OSError as e:
            self._say(
                f"nothing more for TensorBoard: {self._folder} cannot be written to: {e.strerror}"
            )
        except Exception as e:
            if not paths.is_remote(self._folder):
                raise
            self._say(f"nothing more for TensorBoard: {self._folder} cannot be written to: {e}")
        self._board = None


def _describe_speed(speed: Mapping[str, float]) -> str:
    frames = f"{speed['frames_per_second']:.0f} frames/s  " if "frames_per_second" in speed else ""
    use = f"{speed['tflops_per_second_per_device']:.3g} TFLOP/s per device"
    if "mfu" in speed:
        use = f"MFU {speed['mfu']:.1%}"
    return (
        f"{speed['seconds_per_step']:.3f} s/step  {frames}"
        f"{speed['tokens_per_second']:.0f} tokens/s  {use}  data wait {speed['data_wait']:.0%}"
    )

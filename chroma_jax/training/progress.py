"""What a run tells while it goes: a line on the console per interval, and scalars for TensorBoard where tensorboardX is installed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

NO_TENSORBOARD = "tensorboardX is not installed: no TensorBoard scalars (pip install tensorboardX)"


def mean(metrics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of several batches as one: weighted by their frames; "frames" and "decoder_frames" are added up."""
    metrics = jax.device_get(list(metrics))
    weights = np.array([m["frames"] for m in metrics], np.float64)
    weights /= max(weights.sum(), 1.0)
    # A batch without frames may hold anything.
    one = {
        key: float(sum(w * float(m[key]) for w, m in zip(weights, metrics, strict=True) if w))
        for key in metrics[0]
    }
    for key in ("frames", "decoder_frames"):
        one[key] = float(sum(m[key] for m in metrics))
    return one


def describe(metrics: Mapping[str, float]) -> str:
    """Losses and accuracies in short; codes are the losses per codebook."""
    books = sum(key.startswith("loss/code_") for key in metrics)
    codes = " ".join(f"{metrics[f'loss/code_{i}']:.2f}" for i in range(books))
    return (
        f"loss {metrics['loss']:.4f}  backbone {metrics['backbone_loss']:.4f}  decoder {metrics['decoder_loss']:.4f}  "
        f"codes {codes}  accuracy {metrics['backbone_accuracy']:.3f} {metrics['decoder_accuracy']:.3f}"
    )


class Progress:
    """Gathers the metrics of steps and reports them.

    Args:
      steps: of the whole run.
      say: told each line.
      folder: of TensorBoard's files; None for none.
      step: steps done before; what TensorBoard's files hold beyond it is hidden.
    """

    def __init__(self, steps: int, say: Callable[[str], None], folder: str | None, step: int = 0):
        self._steps, self._say = steps, say
        self._writer = _writer(folder, step, say)
        self._first = True
        self._restart()

    def add(self, metrics: Mapping[str, jax.Array], waited: float) -> None:
        """A step was given to the devices, after `waited` seconds for its data."""
        self._metrics.append(metrics)
        self._waited += waited
        if self._first:  # compilation is told apart from what a step takes
            jax.block_until_ready(metrics["loss"])
            self._say(f"first step: {time.monotonic() - self._began:.1f} s, compilation included")
            self._first = False
            self._began, self._waited, self._untimed = time.monotonic(), 0.0, 1

    def pause(self, seconds: float) -> None:
        """Not counted as time of steps."""
        self._began += seconds

    def report(self, step: int) -> dict[str, float]:
        """Tells the interval that ends with `step`."""
        shown = mean(self._metrics)  # waits for the devices
        seconds = time.monotonic() - self._began
        timed = len(self._metrics) - self._untimed
        line = f"step {step}/{self._steps}  {describe(shown)}"
        if timed:
            frames = mean(self._metrics[self._untimed :])["frames"]
            shown["seconds_per_step"] = seconds / timed
            shown["frames_per_second"] = frames / seconds
            shown["data_wait"] = self._waited / seconds
            line += f"  {seconds / timed:.3f} s/step  {frames / seconds:.0f} frames/s  data wait {self._waited / seconds:.0%}"
        self._say(line)
        self._write("train", step, shown)
        self._restart()
        return shown

    def evaluation(self, step: int, shown: Mapping[str, float]) -> None:
        """Tells the result of held-out records."""
        self._say(f"step {step}/{self._steps}  held out: {describe(shown)}")
        self._write("evaluation", step, shown)

    def close(self) -> None:
        """Writes out what is waiting."""
        if self._writer is not None:
            self._writer.close()

    def _restart(self) -> None:
        self._metrics: list[Mapping[str, jax.Array]] = []
        self._began, self._waited, self._untimed = time.monotonic(), 0.0, 0

    def _write(self, prefix: str, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        for key, value in values.items():
            self._writer.add_scalar(f"{prefix}/{key}", float(value), step)
        self._writer.flush()


def _writer(folder: str | None, step: int, say: Callable[[str], None]) -> Any:
    if folder is None:
        return None
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        say(NO_TENSORBOARD)
        return None
    return SummaryWriter(folder, purge_step=step + 1)

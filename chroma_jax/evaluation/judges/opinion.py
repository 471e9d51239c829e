"""Opinion scores whose weights come in wheels: DNSMOS P.835 and DistillMOS."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pathlib
import sys
import types

import numpy as np

from chroma_jax.evaluation.judges import MissingJudge, sound, weights_digest

_DNSMOS_SAMPLES = int(9.01 * sound.RATE)
# What maps the network's three outputs to scores, from the DNS challenge's own script: highest power first.
_DNSMOS_MAPS = {
    "signal": (-0.08397278, 1.22083953, 0.0052439),
    "background": (-0.13166888, 1.60915514, -0.39604546),
    "overall": (-0.06766283, 1.11546468, 0.04602535),
}


class Dnsmos:
    """DNSMOS P.835 (ONNX): the mean over windows of 9.01 s that begin every second; a shorter clip is repeated."""

    name = "DNSMOS P.835 overall"
    scale = "1 to 5"

    def __init__(self):
        home = importlib.util.find_spec("speechmos")
        path = home and pathlib.Path(home.origin).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
        if not path or not path.is_file():
            raise MissingJudge(
                "dnsmos: pip install onnxruntime, then pip install --no-deps speechmos"
            )
        try:
            import onnxruntime
        except ImportError as e:
            raise MissingJudge("dnsmos: pip install onnxruntime") from e
        self.digest = weights_digest([path])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # clips are scored side by side
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def __call__(self, samples: np.ndarray, rate: int) -> float | None:
        """Mono samples [N] -> the overall score, None where there is no speech."""
        found = self.all(samples, rate)
        return found and found["overall"]

    def all(self, samples: np.ndarray, rate: int) -> dict[str, float] | None:
        """Signal, background and overall."""
        if not sound.has_speech(samples, rate):
            return None
        x = sound.soxr(samples, rate)
        while len(x) < _DNSMOS_SAMPLES:
            x = np.append(x, x)
        last = int(len(x) / sound.RATE - 9.01)
        windows = [x[i * sound.RATE :][:_DNSMOS_SAMPLES] for i in range(last + 1)]
        raw = [self._session.run(None, {self._input: w[None]})[0][0] for w in windows]
        raw = np.asarray(raw, np.float64)
        return {
            name: float(np.polyval(coefficients, raw[:, i]).mean())
            for i, (name, coefficients) in enumerate(_DNSMOS_MAPS.items())
        }


class DistillMos:
    """DistillMOS (7th variant): a small transformer taught by one on XLS-R; it ranks voices better than DNSMOS."""

    name = "DistillMOS v7"
    scale = "1 to 5"

    def __init__(self):
        install = "distillmos: pip install torch, then pip install --no-deps distillmos xls-r-sqa"
        home = importlib.util.find_spec("distillmos")
        if not home or not importlib.util.find_spec("xls_r_sqa"):
            raise MissingJudge(install)
        try:
            import torch

            with _without_torchaudio():
                from distillmos import ConvTransformerSQAModel
        except (ImportError, OSError) as e:
            raise MissingJudge(install) from e
        path = pathlib.Path(home.origin).parent / "weights" / "distill_mos_v7.pt"
        self.digest = weights_digest([path])
        self._torch = torch
        with contextlib.redirect_stdout(io.StringIO()):  # it tells where its weights are
            self._model = ConvTransformerSQAModel().eval()

    def __call__(self, samples: np.ndarray, rate: int) -> float | None:
        """Mono samples [N] -> the score, None where there is no speech."""
        if not sound.has_speech(samples, rate):
            return None
        x = sound.soxr(samples, rate)
        with self._torch.inference_mode():
            return float(self._model(self._torch.from_numpy(x[None]))[0])


@contextlib.contextmanager
def _without_torchaudio():
    """DistillMOS imports torchaudio for its command alone, and that does not load beside every torch."""
    if "torchaudio" in sys.modules:
        yield
        return
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        yield
    finally:
        del sys.modules["torchaudio"]

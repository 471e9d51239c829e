"""How near the numbers are to the reference's: a Markdown table of errors against the goldens, measured anew.

    python benchmarks/parity.py [--json=parity.json]

The goldens in tests/data/chroma-tiny come from the public PyTorch code (FlashLabs-Chroma 6551fcb, transformers 5.0.0rc0,
float32, CPU, greedy) on a tiny checkpoint with every part of the real one. Errors are the largest difference over the
largest magnitude. The tests hold the same numbers to their tolerances; this prints what they are.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

import jax
import numpy as np

TESTS = pathlib.Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from parity import test_goldens as goldens  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from chroma_jax.audio.batch import normalize_inputs  # noqa: E402
from chroma_jax.audio.mel import mel_chunks  # noqa: E402
from chroma_jax.checkpoint import load_torch  # noqa: E402
from chroma_jax.engine import programs  # noqa: E402
from chroma_jax.engine.sampling import Sampling  # noqa: E402


def error(got, want) -> float:
    """Largest difference over largest magnitude."""
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def measure(directory: pathlib.Path) -> list[tuple[str, str]]:
    """Rows of the table: what, and how near."""
    config, model = load_torch(directory)
    cases = load_file(directory / "cases.safetensors")
    rows = []

    def near(what: str, got, want) -> None:
        rows.append((what, f"{error(got, want):.1e}"))

    def equal(what: str, got, want) -> None:
        same = int((np.asarray(got) == want).sum())
        rows.append((what, f"{same} of {np.size(want)} equal"))

    mel, mask = cases["audio_tower/mel"], cases["audio_tower/mel_mask"].astype(bool)
    clips = [m.T[valid] for m, valid in zip(mel, mask, strict=True)]
    chunks, lengths = mel_chunks(clips, config.reasoner.audio.chunk_frames)
    features = jax.jit(lambda m: m.reasoner.encode_audio(chunks[None], lengths[None]))(model)
    want = cases["audio_tower/features_packed"]
    near("Reasoner: audio features, three clips", features[0, : len(want)], want)
    hidden = jax.jit(lambda m, x, p: m.reasoner.llama(x, p))(
        model, cases["tm_rope/embeddings"], cases["tm_rope/position_ids"]
    )
    near("Reasoner: hidden states, unequal TM-RoPE components", hidden, cases["tm_rope/hidden"])
    codes = jax.jit(lambda m, w: m.codec.encode(w))(model, cases["codec/wave"][:, 0])
    equal("Codec: codes of two waves", np.swapaxes(codes, 1, 2), cases["codec/codes"])
    wave = jax.jit(lambda m, c: m.codec.decode(c))(
        model, np.swapaxes(cases["codec/decode_codes"], 1, 2).astype(np.int32)
    )
    near("Codec: wave of random codes", wave, cases["codec/decoded_wave"][:, 0])

    for case in goldens.CASES:
        own = goldens.for_case(model, cases, case)
        batch = normalize_inputs(own.cfg, goldens.inputs_of(cases, case))
        prompt = programs.as_prompt(batch, *programs.encode_voices(own, batch))
        frames = cases[f"{case}/frames"]
        count, length = frames.shape[:2]
        start = [Sampling()] * count, [0] * count
        state = programs.begin(own, prompt, length, *start)
        first = state.hidden, own.reasoner.logits(state.hidden)
        _, out = programs.decode(own, state, length // 2, trace=True)
        out = jax.tree.map(lambda x: np.swapaxes(x, 0, 1), out)
        trace = out.trace
        flat = lambda x, n=count, t=length: x.reshape(n, t, *x.shape[3:])  # noqa: E731
        steps = cases[f"{case}/text_tokens"].shape[1]
        equal(f"{case}: codes", out.frames.reshape(frames.shape), frames)
        equal(f"{case}: text tokens", out.token[:, :steps], cases[f"{case}/text_tokens"])
        near(f"{case}: wave", out.samples.reshape(count, -1), cases[f"{case}/audio"][:, 0])
        near(f"{case}: first text logits", first[1], cases[f"{case}/prefill/reasoner_logits_last"])
        want = cases[f"{case}/reasoner_last_hidden"]
        near(f"{case}: Reasoner states", trace.reasoner_hidden[:, :steps], want)
        near(
            f"{case}: Backbone states",
            flat(trace.backbone_hidden),
            cases[f"{case}/backbone_hidden"],
        )
        near(f"{case}: code 0 logits", flat(trace.code0_logits), cases[f"{case}/c0_logits"])
        want = cases[f"{case}/decoder_logits"]
        near(f"{case}: codes 1..7 logits", flat(trace.code_logits)[:, : want.shape[1]], want)
    return rows


def main() -> None:
    """Prints the table and writes JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=os.path.expanduser, help="also write the table here")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    rows = measure(TESTS / "data" / "chroma-tiny")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print("| value | against the reference |\n| --- | --- |")
    for what, how in rows:
        print(f"| {what} | {how} |")
    if args.json:
        content = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "rows": rows}
        pathlib.Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

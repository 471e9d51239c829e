"""How far bfloat16, int8 and fp8 are from float32, on the goldens' inputs: stated, and held.

The golden weights are random, which is harder than real ones: logits lie close together. `test_quantized_real.py` has those.
"""

import jax
import numpy as np
import pytest

from chroma_jax import schedule
from chroma_jax.audio.batch import normalize_inputs
from chroma_jax.checkpoint import load
from chroma_jax.engine import programs

from .test_goldens import for_case, inputs_of

# Error of the logits in L2, relative to their own; fraction of positions with the same greedy choice.
STATED = {
    "bfloat16": (0.025, 0.95),
    "int8": (0.05, 0.85),
    "fp8": (0.18, 0.75),
    "int8 in bfloat16": (0.06, 0.80),
}
LOADED = {
    "bfloat16": dict(dtype="bfloat16"),
    "int8": dict(quantize="int8"),
    "fp8": dict(quantize="fp8"),
    "int8 in bfloat16": dict(dtype="bfloat16", quantize="int8"),
}
CASE = "left_padded_batch"


@jax.jit
def outputs(model, ids, chunks, chunk_lengths, dialogue):
    features = model.reasoner.encode_audio(chunks, chunk_lengths)
    speech = schedule.teacher_forced(model, dialogue)
    text = model.reasoner.logits(model.reasoner(ids, features))
    return text, speech.code0_logits, speech.code_logits


@pytest.fixture(scope="module")
def given(golden, cases):
    """The arguments of `outputs` after the model, which positions of its text count, and its results in float32."""
    model = for_case(golden.model, cases, CASE)
    batch = normalize_inputs(model.cfg, inputs_of(cases, CASE))
    prompt = programs.as_prompt(batch, *programs.encode_voices(model, batch))
    frames, text = cases[f"{CASE}/frames"], cases[f"{CASE}/text_tokens"]
    hidden = cases[f"{CASE}/reasoner_last_hidden"]
    count = min(text.shape[1], hidden.shape[1])
    ids = np.pad(batch.ids, ((0, 0), (0, count)))
    for row, length in enumerate(batch.lengths):
        ids[row, length : length + count] = text[row, :count]
    all_of = lambda n: np.full(len(frames), n, np.int32)  # noqa: E731
    dialogue = schedule.Dialogue(
        *(
            prompt.voice_ids,
            prompt.voice_id_lengths,
            prompt.voice_frames,
            prompt.voice_frame_lengths,
        ),
        *(hidden[:, :count], text[:, :count], all_of(count), frames, all_of(frames.shape[1])),
    )
    arguments = ids, prompt.chunks, prompt.chunk_lengths, dialogue
    valid = np.arange(ids.shape[1]) < batch.lengths[:, None] + count
    return arguments, valid, outputs(golden.model, *arguments)


@pytest.mark.parametrize("how", STATED)
def test_logits_and_greedy_choices(golden_dir, given, how):
    arguments, valid, want = given
    model = load(golden_dir, **LOADED[how]).model
    got = outputs(model, *arguments)
    most, least = STATED[how]
    for stage, a, b in zip(("text", "code 0", "codes 1..7"), got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        a, b = (a[valid], b[valid]) if stage == "text" else (a, b)
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        same = (a.argmax(-1) == b.argmax(-1)).mean()
        print(f"{how}, {stage}: error {error:.4f}, {same:.3f} of {b[..., 0].size} equal")
        assert 0 < error < most, stage
        assert same >= least, stage

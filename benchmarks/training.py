"""Speed and memory of the training step on the device at hand.

    python benchmarks/training.py --size=chroma_4b --out=out/bench

The paper's first stage (Backbone and Decoder train, the Reasoner runs frozen) on random dialogues, four rows a step unless --rows
says otherwise: an 8-second question and voice, a 20-second answer. Operations are those that the step needs: products and
convolutions of its jaxpr without rematerialisation. MFU is their rate over that of a large matrix product measured on the same device.
"""

from __future__ import annotations

import common
import jax
import numpy as np
from common import Report
from roofline import product_rate

from chroma_jax.config import ChromaConfig
from chroma_jax.data.batch import Batch

QUESTION_SECONDS, VOICE_SECONDS, ANSWER_SECONDS = 8, 8, 20


def random_batch(config: ChromaConfig, rows: int, scale: float) -> Batch:
    """Dialogues of one length each, `scale` of the usual."""
    rng = np.random.default_rng(0)
    prompt = common.make_prompt(config, rows, QUESTION_SECONDS * scale, VOICE_SECONDS * scale)
    frames = 2 * common.count_beats(config, ANSWER_SECONDS * scale)
    tokens = frames // 2
    words = min(config.reasoner.audio_token_id, config.im_end_token_id)
    text = rng.integers(0, words, (rows, tokens), dtype=np.int32)
    length = int(prompt.lengths[0])
    ids = np.concatenate([np.asarray(prompt.ids)[:, :length], text], axis=1)
    codes = rng.integers(1, config.codec.codebook_size, (rows, frames, config.num_codebooks))
    return Batch(
        prompt_ids=ids,
        prompt_lengths=np.asarray(prompt.lengths),
        chunks=np.asarray(prompt.chunks),
        chunk_lengths=np.asarray(prompt.chunk_lengths),
        hidden=None,
        text=text,
        text_lengths=np.full(rows, tokens, np.int32),
        frames=codes.astype(np.int32),
        frame_lengths=np.full(rows, frames, np.int32),
        voice_ids=np.asarray(prompt.voice_ids),
        voice_id_lengths=np.asarray(prompt.voice_id_lengths),
        voice_frames=np.asarray(prompt.voice_frames),
        voice_frame_lengths=np.asarray(prompt.voice_frame_lengths),
        record_ids=np.arange(rows, dtype=np.int64),
    )


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes DIR/training.json."""
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=4, help="dialogues in a step")
    parser.add_argument("--remat", default="none", help="see LlamaConfig.remat")
    args = parser.parse_args(argv)
    # Optax is needed from here on.
    from chroma_jax.training import selection
    from chroma_jax.training.config import OptimizerConfig, TrainConfig
    from chroma_jax.training.step import build
    from chroma_jax.training.step_flops import StepFlops

    cpu = jax.default_backend() == "cpu"
    dtype = args.dtype or ("float32" if cpu else "bfloat16")
    if args.checkpoint:
        raise SystemExit("training is measured with random weights: give --size")
    config = common.SIZES[args.size]()
    optimizer = OptimizerConfig(
        learning_rate=5e-5, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0,
        schedule="constant", warmup_steps=0, total_steps=100,
    )  # fmt: skip
    train = TrainConfig(
        optimizer=optimizer, trains=selection.STAGE_1, decoder_weight=0.5, compute_dtype=dtype,
        reasoner_dtype=dtype, remat=args.remat,
    )  # fmt: skip
    report = Report(
        "training", args, model=args.size, notes=f"random weights, {dtype}, remat {args.remat}"
    )
    trainer = build(config, train)
    model = common.hashed_model(trainer.cfg)
    state, frozen = trainer.from_model(model)
    del model
    host = random_batch(config, args.rows, 0.1 if args.quick else 1.0)
    needed = StepFlops(trainer)(host)
    batch = trainer.put(host)
    step = lambda s: trainer.train_step(s, frozen, batch)  # noqa: E731
    first, state = common.step_through(step, state, repeats=1, warm=0)
    times, state = common.step_through(step, state, repeats=2 if args.quick else 10)
    size, repeats = (256, 3) if args.quick else (2048 if cpu else 8192, 10)
    rate = product_rate(size, dtype, repeats)
    frames = int(batch.frame_lengths.sum())
    positions = frames + int(
        (2 * batch.text_lengths + batch.voice_id_lengths + batch.voice_frame_lengths + 3).sum()
    )
    what, memory = common.peak_memory()
    report.table(
        f"A step of {args.rows} dialogues",
        [
            {
                "seconds, median": times.median,
                "p95": times.p95,
                "compile and first step, s": first[0],
                "Backbone positions per s": positions / times.median,
                "audio seconds per s": frames / config.codec.frame_rate / times.median,
                "TFLOP of a step": needed / 1e12,
                "TFLOP/s": needed / times.median / 1e12,
                f"MFU of {rate / 1e12:.3g} TFLOP/s": f"{needed / times.median / rate:.1%}",
                f"peak {what}, GB": memory / 1e9,
                "weights and moments, GB": common.weight_bytes(state, frozen) / 1e9,
            }
        ],
    )


if __name__ == "__main__":
    main()

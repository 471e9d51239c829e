"""Runs of objective "codec": from sound files to a Codec that transformers loads, interrupted, with the bits of one that was not."""

import os

import numpy as np
import pytest
import small_codec as small
import small_run
import soundfile

from chroma_jax import train
from chroma_jax.audio.wav import load_audio
from chroma_jax.checkpoint.codec_files import load_codec
from chroma_jax.training import codec_run, loop, run_config
from chroma_jax.training.run import SAMPLES

pytest.importorskip("grain")

SECONDS = small.FRAME * 8 / 24000


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Three tones of a few hundred frames."""
    folder = tmp_path_factory.mktemp("sounds")
    for i, size in enumerate((1500, 900, 2000)):
        tone = 0.3 * np.sin((0.1 + 0.1 * i) * np.arange(size))
        soundfile.write(folder / f"{i}.wav", tone, 24000)
    return folder


@pytest.fixture(scope="module")
def values(sounds):
    """A configuration as a file would hold it."""
    config = small.train_config(dict(quantizer_start=3))
    train = {
        "objective": "codec",
        "compute_dtype": "float32",
        "trains": config.trains,
        "optimizer": vars(config.optimizer),
        "codec": vars(config.codec),
    }
    return dict(
        model=dict(size="tiny"),
        data=dict(
            train=str(sounds), evaluation=str(sounds), batch_size=2, num_shapes=1, threads=1, prefetch=1,
            crop_seconds=SECONDS, gain_db=3.0,
        ),
        train=train, steps=6, save_every=3, eval_every=6, log_every=2, keep=4, sample_every=6, num_samples=2,
        sample_seconds=0.05,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_sizes():
    """ "tiny" is the codec of the other tests here, whose programs are compiled in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run_config.CODEC_SIZES, "tiny", small.codec_config)
        yield


def run(values, workdir, export="never", **changes):
    lines = []
    config = run_config.RunConfig.from_dict(values | changes)
    return loop.train(config, workdir, export=export, say=lines.append), lines


@pytest.fixture(scope="module")
def straight(values, tmp_path_factory):
    """Six steps without an incident: workdir, outcome, lines."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    return workdir, *run(values, workdir, "end")


def test_a_run_trains_tests_and_speaks(straight):
    workdir, outcome, lines = straight
    assert (outcome.step, outcome.signal) == (6, None)
    said = "\n".join(lines)
    for text in (
        "3 sounds, 0.0 min",
        "step 2/6  loss ",
        "held out: loss",
        "reply to",
    ):
        assert text in said
    # Without the quantizer for three steps.
    assert "commitment 0.0000" in next(line for line in lines if line.startswith("step 2/6"))
    assert outcome.evaluation["frames"] == 3 * 8 and outcome.train["commitment"] > 0
    folder = workdir / SAMPLES
    assert sorted(os.listdir(folder)) == ["record", "step_000006"]
    original = load_audio(str(folder / "record" / "0.wav"), 24000)
    made = load_audio(str(folder / "step_000006" / "0.wav"), 24000)
    assert len(made) == len(original) == 1200 and np.abs(made).max() > 0
    np.testing.assert_allclose(original, 0.3 * np.sin(0.1 * np.arange(1200)), atol=1e-3)


def test_the_codec_is_written_in_mimis_layout(straight):
    cfg, codec = load_codec(straight[1].model)
    assert cfg == small.codec_config()
    state = small_run.state(straight[0], 6)
    kernel = next(a for p, a in state.items() if "params" in p and "encoder']['layers']['0']['kernel" in p)  # fmt: skip
    np.testing.assert_array_equal(codec.encoder.layers[0].kernel[...], kernel)
    for part in (codec.quantizer.semantic, codec.quantizer.acoustic):
        assert np.asarray(part.initialized[...]).all()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3], ids=["in between", "where codebooks are made"])
def test_a_stopped_run_goes_on_bit_for_bit(values, straight, tmp_path, stop):
    workdir = tmp_path / "run"
    run(values, workdir, steps=stop)
    _, lines = run(values, workdir)
    assert f"resuming after step {stop}" in lines
    small_run.assert_same_bits(small_run.state(workdir, 6), small_run.state(straight[0], 6))


def test_training_goes_on_from_a_codec(values, straight, tmp_path):
    """What another run has trained begins where it was."""
    model = dict(checkpoint=str(straight[1].model), size="tiny")
    config = run_config.RunConfig.from_dict(values | dict(model=model))
    source, sizes = codec_run.read_sizes(config)
    trainer = loop.build(sizes, config.train)
    state, _ = codec_run.begin(config, trainer, source, [])
    _, codec = load_codec(source)
    for name in ("embed_sum", "initialized"):
        ours = state.averages["codec"]["quantizer"]["acoustic"][name]
        np.testing.assert_array_equal(ours, getattr(codec.quantizer.acoustic, name)[...])


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("data", dict(crop_seconds=None), "data.crop_seconds is missing"),
        ("data", dict(crop_seconds=0.0101), "must be a multiple of a frame's 0.0005 s"),
        ("model", dict(size="chroma_4b"), "model.size must be one of tiny, mini, mimi, got 'chroma_4b'"),
        ("data", dict(batch_size=1), "gives 16 latents: 32 codewords want at least as many"),
        ("data", dict(train="nowhere"), "nowhere"),
    ],
    ids=["no length", "no whole frames", "a whole Chroma", "few latents", "no sound"],
)  # fmt: skip
def test_mistakes(values, tmp_path, part, changes, message):
    with pytest.raises(ValueError) as error:
        run(values, tmp_path / "run", **{part: values[part] | changes})
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_there_is_no_compiling_for_a_slice(values):
    config = run_config.RunConfig.from_dict(values)
    with pytest.raises(
        ValueError, match="compiles steps on dialogues, not those of objective 'codec'"
    ):
        train.compile_only(config, "v5e:2x2", 1)

"""What a run says of itself: losses, speed, utilisation, and the files that TensorBoard reads."""

import errno
import os
import struct
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_training as small

from chroma_jax import schedule
from chroma_jax.audio.wav import load_audio
from chroma_jax.cost import flops
from chroma_jax.cost.tpu import CHIPS
from chroma_jax.training import progress
from chroma_jax.training.objectives.dialogue import Speech
from chroma_jax.training.progress import Progress
from chroma_jax.training.samples import Sample
from chroma_jax.training.step import build
from chroma_jax.training.step_flops import StepFlops

METRICS = {
    "loss": 2.0, "backbone_loss": 1.0, "decoder_loss": 3.0, "backbone_accuracy": 0.5, "decoder_accuracy": 0.25,
    "frames": 10.0, "decoder_frames": 10.0, "loss/code_0": 1.0, "loss/code_1": 3.0,
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when told to."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    return now


OBJECTIVE = Speech(small.CONFIG, small.train_config())
DESCRIBE = OBJECTIVE.describe


def run(clock, kind, steps, folder=None, count=4):
    """(lines, metrics of the interval) of steps: (seconds, seconds of them waiting, compiled) each."""
    lines = []
    device = SimpleNamespace(device_kind=kind)
    told = Progress(9, lines.append, folder, DESCRIBE, devices=[device] * count)
    for seconds, waited, compiled in steps:
        began, clock.seconds = clock.seconds, clock.seconds + seconds
        told.add(METRICS, began, waited, flops=8e15, tokens=1000, compiled=compiled)
    shown = told.report(len(steps))
    told.close()
    return lines, shown


STEPS = [(30.0, 1.0, True), (5.0, 0.5, False), (40.0, 2.0, True), (3.0, 0.5, False)]


def test_speed_is_that_of_steps_that_were_not_compiled_for(clock):
    lines, shown = run(clock, "NVIDIA H100 80GB HBM3", STEPS)
    assert lines[0] == "first step: 30.0 s, compilation included"
    assert lines[1] == "a batch of another shape: 40.0 s, compilation included"
    assert lines[2].startswith("step 4/9  loss 2.0000  backbone 1.0000  decoder 3.0000")
    # 20 frames, 2000 positions and 16e15 operations on four devices in 8 seconds.
    assert "4.000 s/step  2 frames/s  250 tokens/s  MFU 50.6%  data wait 12%" in lines[2]
    assert shown["mfu"] == pytest.approx(16e15 / 8 / 4 / 989e12)
    assert shown["frames"] == 40 and shown["frames_per_second"] == 20 / 8


def test_an_unknown_device_has_no_utilisation(clock):
    lines, shown = run(clock, "cpu", STEPS)
    assert "250 tokens/s  500 TFLOP/s per device  data wait" in lines[2]
    assert "mfu" not in shown and shown["tflops_per_second_per_device"] == 500


def test_an_interval_of_compilation_alone_has_no_speed(clock):
    lines, shown = run(clock, "cpu", STEPS[:1])
    assert lines[-1].endswith("accuracy 0.500 0.250") and "seconds_per_step" not in shown


PEAKS = {
    "TPU v4": CHIPS["v4"].peak,
    "TPU v5 lite": CHIPS["v5e"].peak,
    "TPU v5": CHIPS["v5p"].peak,
    "TPU v5p": CHIPS["v5p"].peak,
    "TPU v6 lite": CHIPS["v6e"].peak,
    "TPU v6e": CHIPS["v6e"].peak,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4 lite": None,
    "NVIDIA GeForce RTX 4090": None,
    "cpu": None,
}


@pytest.mark.parametrize(("kind", "wanted"), PEAKS.items(), ids=PEAKS)
def test_peaks(kind, wanted):
    assert progress.peak(kind) == wanted


def test_positions_are_those_of_the_sequence():
    batch = small.batch()
    batch.frame_lengths[0] = batch.text_lengths[0] = 0  # a row of padding
    batch.text_lengths[1], batch.frame_lengths[1] = 3, 3  # a word that the frames have no room for
    text = np.minimum(batch.text_lengths, (batch.frame_lengths + 1) // 2)
    where = schedule.layout(
        batch.voice_id_lengths, batch.voice_frame_lengths, text, batch.frame_lengths, 64
    )
    assert OBJECTIVE.positions(batch) == (np.asarray(where.kind)[1:] != schedule.Kind.PAD).sum()


def events(folder):
    """Everything in TensorBoard's files: (tag, step) -> value."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.glob("events*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found |= {(value.tag, event.step): value for value in event.summary.value}
            at += 16 + size
    return found


def test_tensorboard(clock, tmp_path):
    pytest.importorskip("tensorboardX")
    _, shown = run(clock, "TPU v4", STEPS, folder=str(tmp_path / "a"), count=1)
    found = events(tmp_path / "a")
    for key in ("loss", "loss/code_1", "seconds_per_step", "tokens_per_second", "data_wait", "mfu"):
        assert found[f"train/{key}", 4].simple_value == pytest.approx(shown[key])

    lines = []
    told = Progress(9, lines.append, str(tmp_path / "b"), DESCRIBE)
    wave = np.sin(np.arange(4800) / 20).astype(np.float32)
    spoken = Sample("r7", 'he said "so"', "stop", True, np.zeros((3, 8)), wave, 2 / 3)
    told.recorded(3, [spoken], 24000)
    told.samples(3, [spoken, Sample("r8", "written", "length", False)], 24000)
    told.evaluation(3, METRICS)
    told.close()
    assert lines[:2] == [
        'step 3/9  reply to r7: "he said \\"so\\"" (the record\'s words)  stop  0.20 s  66.7% of the record\'s frames',
        'step 3/9  reply to r8: "written" (other words)  length',
    ]
    found = events(tmp_path / "b")
    assert found["evaluation/decoder_loss", 3].simple_value == 3
    assert found["sample_0/same_frames", 3].simple_value == pytest.approx(2 / 3)
    texts = {tag: value for (tag, _), value in found.items() if "text" in tag}
    assert sorted(texts) == [f"sample_{name}_text/text_summary" for name in ("0/record", "0/reply", "1/reply")]  # fmt: skip
    assert texts["sample_0/reply_text/text_summary"].tensor.string_val == [b'he said "so"']
    for tag in ("sample_0/reply", "sample_0/record"):
        sound = found[tag, 3].audio
        assert sound.sample_rate == 24000
        heard = load_audio(sound.encoded_audio_string, 24000)
        np.testing.assert_allclose(heard, wave, atol=1e-4)
    assert ("sample_1/reply", 3) not in found


def test_a_disk_that_fills_up_ends_tensorboard_and_nothing_else(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    lines = []
    told = Progress(9, lines.append, str(tmp_path), DESCRIBE)
    told.evaluation(1, METRICS)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told.evaluation(2, METRICS)
    told.evaluation(3, METRICS)
    told.close()
    complaint = f"nothing more for TensorBoard: {tmp_path} cannot be written to: No space left on device"  # fmt: skip
    assert [line.startswith("step") for line in lines] == [True, True, False, True]
    assert lines[2] == complaint
    assert events(tmp_path)["evaluation/loss", 1].simple_value == 2


@pytest.mark.slow
def test_operations_of_a_step_are_counted_for_each_shape_without_remat(monkeypatch):
    trainer = build(small.CONFIG, small.train_config(remat="full", mesh=dict(fsdp=8)))
    count = StepFlops(trainer)
    eight, sixteen = count(small.batch(8)), count(small.batch(16))
    # All rows cost the same.
    assert sixteen == 2 * eight
    plain = build(small.CONFIG, small.train_config())
    assert StepFlops(plain)(small.batch(8)) == eight
    again = flops.flops(trainer._train, *plain.abstract(), trainer.put(small.batch(8)))
    assert 1.05 * eight < again < 1.5 * eight
    # Without the Reasoner: three products of each kernel with the positions it sees, and a little for heads and attention.
    sizes = {path: leaf.size for path, leaf in trainer._shapes.items() if "/layers/" in path and "norm" not in path}  # fmt: skip
    kernels = {part: sum(n for path, n in sizes.items() if path.startswith(part)) for part in ("backbone", "decoder")}  # fmt: skip
    backbone = schedule.total_length(3, 2, small.TOKENS, small.FRAMES) * kernels["backbone"]
    products = 6 * 8 * (backbone + small.FRAMES * 8 * kernels["decoder"])
    assert products < count(small.with_hidden(8)) < 1.3 * products
    monkeypatch.setattr(flops, "flops", lambda *_: pytest.fail("traced again"))
    assert count(small.batch(8)) == eight and count(small.batch(16)) == sixteen
    # A process counts what all processes do.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert count(small.batch(8)) == sixteen

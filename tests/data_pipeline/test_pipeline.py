"""The pipeline: batches hold the records, any state comes back exactly, processes share the work, mistakes are told."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from corpus import OPTIONS, read_records, write_corpus

from chroma_jax.data import metadata as md
from chroma_jax.data.batch import check
from chroma_jax.data.dataset import Dataset
from chroma_jax.data.files import write_atomically
from chroma_jax.data.mixture import Source
from chroma_jax.data.pipeline import Reading, make_evaluation, make_pipeline
from chroma_jax.data.plan import Limits, Shape
from chroma_jax.data.prepare import prepare

READING = Reading(threads=2, prefetch=2)


@pytest.fixture(scope="module")
def config(golden):
    return golden.config


@pytest.fixture(scope="module")
def prepared(dataset_dir):
    return read_records(dataset_dir)


@pytest.fixture
def pipeline(config, dataset_dir):
    def make(*sources, **changes):
        request = dict(batch_size=4, seed=3, reading=READING, num_shapes=2) | changes
        return make_pipeline(config, sources or [dataset_dir], **request)

    return make


def equal(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=name)


def row(batch, i):
    """What of row i is valid."""
    n, m = batch.prompt_lengths[i], batch.text_lengths[i]
    return {
        "prompt": batch.prompt_ids[i, : n + m],
        "text": batch.text[i, :m],
        "frames": batch.frames[i, : batch.frame_lengths[i]],
        "voice": batch.voice_frames[i, : batch.voice_frame_lengths[i]],
        "voice_ids": batch.voice_ids[i, : batch.voice_id_lengths[i]],
    }


def check_rows(batch, prepared, config):
    """Every row is its record; nothing stands beyond its lengths. Returns the records that voices are of."""
    check(batch)
    voices = []
    for i, number in enumerate(batch.record_ids):
        record, got = prepared[number], row(batch, i)
        np.testing.assert_array_equal(got["prompt"], [*record.question_ids, *record.text])
        np.testing.assert_array_equal(got["text"], record.text)
        np.testing.assert_array_equal(got["frames"], record.codes)
        assert got["prompt"][batch.prompt_lengths[i] :].tolist() == record.text.tolist()
        chunks, lengths = record.chunks(200)
        np.testing.assert_array_equal(batch.chunks[i, : len(lengths)].reshape(chunks.shape), chunks)
        np.testing.assert_array_equal(batch.chunk_lengths[i, : len(lengths)], lengths)
        assert not batch.chunk_lengths[i, len(lengths) :].any()
        pad = config.reasoner.pad_token_id
        assert (batch.text[i, len(record.text) :] == pad).all()
        assert (batch.prompt_ids[i, len(got["prompt"]) :] == pad).all()
        assert (batch.frames[i, len(record.codes) :] == config.codebook_pad_token_id).all()
        if record.id == "r6":  # nameless, with a recording of its own
            np.testing.assert_array_equal(got["voice"], record.voice_codes)
            np.testing.assert_array_equal(got["voice_ids"], record.voice_ids)
            continue
        (other,) = [r for r in prepared if np.array_equal(r.codes[: r.reference_frames], got["voice"])]  # fmt: skip
        np.testing.assert_array_equal(got["voice_ids"], other.reference_ids)
        assert other.id != record.id
        assert other.speaker == record.speaker
        voices.append((record.id, other.id))
    return voices


def test_batches_hold_the_records(pipeline, prepared, config):
    batches, shapes, voices = pipeline(epochs=8), set(), set()
    assert batches.batches_per_epoch == 2
    seen = []
    for batch in batches:
        voices |= set(check_rows(batch, prepared, config))
        shapes.add(tuple(np.shape(x) for x in batch if x is not None))
        seen.append(batch.record_ids)
    assert len(seen) == 16
    assert len(shapes) <= 2
    for a, b in zip(seen[::2], seen[1::2], strict=True):
        assert len({*a, *b}) == 8
    # Voices change from epoch to epoch: ada and bob have others to choose from.
    assert len({v for r, v in voices if r == "r0"}) >= 2
    assert batches.position == 16
    assert batches.epoch == 8
    with pytest.raises(StopIteration):
        next(batches)


def test_batches_are_computed_from_the_seed(pipeline):
    want = [next(b) for b in [pipeline()] for _ in range(6)]
    for reading in (Reading(threads=1, prefetch=1), Reading(threads=7, prefetch=20)):
        batches = pipeline(reading=reading)
        for batch in want:
            equal(next(batches), batch)
    other = pipeline(seed=4)
    assert not all(np.array_equal(next(other).record_ids, b.record_ids) for b in want)


def test_state_is_exact(pipeline):
    rng = np.random.default_rng(0)
    batches = pipeline()
    want, states = [], []
    for _ in range(14):
        states.append(json.loads(json.dumps(batches.get_state())))
        want.append(next(batches))
    for at in rng.permutation(14)[:6]:
        fresh = pipeline()
        for _ in range(rng.integers(0, 4)):
            next(fresh)  # wherever it stood
        fresh.set_state(states[at])
        assert fresh.get_state() == states[at]
        for batch in want[at : at + 3]:
            equal(next(fresh), batch)
    batches.set_state(states[2])
    equal(next(batches), want[2])


def test_states_of_other_pipelines(pipeline, dataset_dir):
    state = pipeline().get_state()
    for changes in (dict(seed=4), dict(batch_size=2), dict(num_shapes=1)):
        with pytest.raises(ValueError, match="other data, seed, batch size or shapes"):
            pipeline(**changes).set_state(state)
    with pytest.raises(ValueError, match="no state"):
        pipeline().set_state({"next_index": 3})
    with pytest.raises(ValueError, match="no state"):
        pipeline().set_state(state | {"position": -1})


def test_processes_share_each_batch(pipeline):
    whole, parts = pipeline(), [pipeline(process_index=i, process_count=2) for i in range(2)]
    for _ in range(5):
        batch, halves = next(whole), [next(p) for p in parts]
        for name, x in batch._asdict().items():
            if x is not None:
                np.testing.assert_array_equal(
                    np.concatenate([getattr(h, name) for h in halves]), x, err_msg=name
                )
    # A state moves to another number of processes.
    whole.set_state(parts[1].get_state())
    assert whole.position == 5
    np.testing.assert_array_equal(next(whole).record_ids[2:], next(parts[1]).record_ids)


def test_hidden_states_replace_the_question(pipeline, hidden_dir, prepared):
    states = read_records(hidden_dir)
    batch = next(pipeline(hidden_dir))
    check(batch)
    assert batch.prompt_ids.shape == (4, 1)
    assert batch.chunks.shape == (4, 1, 1, 1)
    assert batch.hidden.dtype == np.float32
    for i, number in enumerate(batch.record_ids):
        hidden = states[number].hidden
        np.testing.assert_array_equal(batch.hidden[i, : len(hidden)], hidden)
        assert not batch.hidden[i, len(hidden) :].any()
        np.testing.assert_array_equal(row(batch, i)["frames"], prepared[number].codes)


@pytest.fixture(scope="module")
def second_dir(tmp_path_factory, clip, golden_dir, one_device):
    """Another dataset, of the same names and other sounds."""
    root = tmp_path_factory.mktemp("second")
    manifest = write_corpus(root / "c", clip[::-1], 4)
    prepare(manifest, golden_dir, root / "o", OPTIONS, devices=one_device)
    return root / "o"


def test_mixtures(pipeline, dataset_dir, second_dir, prepared):
    sources = [Source(directory=dataset_dir), Source(directory=second_dir, weight=3.0)]
    batches = pipeline(*sources, epochs=16)
    other = read_records(second_dir)
    counts = np.zeros(14, int)
    for batch in batches:
        np.add.at(counts, batch.record_ids, 1)
        for i, number in enumerate(batch.record_ids):
            record = prepared[number] if number < 10 else other[number - 10]
            np.testing.assert_array_equal(row(batch, i)["frames"], record.codes)
            voices = prepared if number < 10 else other  # speakers are those of one dataset
            own = [r.codes[:-1].tobytes() for r in voices] + [record.voice_codes.tobytes()]
            assert row(batch, i)["voice"].astype(np.int16).tobytes() in own
    assert counts.sum() == 16 * 12  # two of 14 draws are left out of each epoch
    assert 0.7 < counts[10:].sum() / counts.sum() < 0.8
    assert batches.mixture.describe()[:2] == [
        f"{dataset_dir}: 10 records, weight 1",
        f"{second_dir}: 4 records, weight 3",
    ]


def test_evaluation_is_one_pass(config, dataset_dir, prepared):
    evaluation = make_evaluation(config, [dataset_dir], batch_size=4, reading=READING, num_shapes=2)
    first, second = list(evaluation), list(evaluation)
    assert len(evaluation) == len(first) == 3
    for a, b in zip(first, second, strict=True):
        equal(a, b)
    numbers = np.concatenate([b.record_ids for b in first])
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(10))
    filled = first[-1].record_ids < 0
    assert filled.sum() == 2
    check(first[-1])
    assert not first[-1].frame_lengths[filled].any()
    assert not first[-1].text_lengths[filled].any()
    assert (first[-1].prompt_lengths >= 1).all()
    check_rows(first[0], prepared, config)
    # Two processes see the two halves.
    halves = [
        make_evaluation(config, [dataset_dir], batch_size=4, reading=READING, num_shapes=2, process_index=i, process_count=2)
        for i in range(2)
    ]  # fmt: skip
    for whole, *parts in zip(first, *halves, strict=True):
        np.testing.assert_array_equal(
            np.concatenate([p.record_ids for p in parts]), whole.record_ids
        )


def test_limits(pipeline, prepared, dataset_dir):
    with pytest.raises(
        ValueError, match=r'3 records are beyond max_frames 12, the first is record 4 .*"drop"'
    ):
        pipeline(limits=Limits(max_frames=12))  # fmt: skip
    batches = pipeline(limits=Limits(max_frames=12, max_text=20, on_long="drop"), batch_size=2)
    kept = {i for i, r in enumerate(prepared) if len(r.codes) <= 12 and len(r.text) <= 20}
    seen = {int(n) for _ in range(12) for n in next(batches).record_ids}
    assert seen == kept
    assert sum(batches.mixture.dropped.values()) == 10 - len(kept)
    assert "beyond max_frames" in "\n".join(batches.mixture.describe())
    with pytest.raises(ValueError, match="no records within the limits"):
        pipeline(limits=Limits(max_frames=1, on_long="drop"))


def test_given_shapes(pipeline):
    shape = Shape(prompt=320, chunks=2, text=32, frames=16, voice_ids=32, voice_frames=32)
    batch = next(pipeline(shapes=[shape]))
    assert batch.prompt_ids.shape == (4, 320)
    assert batch.frames.shape == (4, 16, 8)
    assert batch.chunks.shape == (4, 2, 200, 128)
    assert batch.voice_frames.shape == (4, 32, 8)
    with pytest.raises(ValueError, match="does not fit the largest shape"):
        pipeline(shapes=[shape._replace(frames=15)])
    with pytest.raises(ValueError, match="the smallest shape holds"):
        pipeline(shapes=[shape._replace(voice_frames=3)])


def test_mistakes(pipeline, config, dataset_dir, hidden_dir, tmp_path):
    for changes, message in (
        (dict(batch_size=11), "10 records are fewer than a batch of 11"),
        (dict(batch_size=4, process_count=3), "batch_size 4 does not divide over 3 processes"),
        (dict(process_index=1), "process_index 1 is not one of 1"),
        (dict(seed=-1), "seed"),
        (dict(num_shapes=0), "num_shapes"),
        (dict(codec="0123"), "another Codec"),
        (dict(tokenizer="0123"), "another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(**changes)
    with pytest.raises(ValueError, match="no datasets"):
        make_pipeline(config, [], batch_size=4)
    with pytest.raises(md.DatasetError, match="no such dataset"):
        pipeline(tmp_path / "absent")
    with pytest.raises(ValueError, match="some datasets have precomputed"):
        pipeline(dataset_dir, hidden_dir)
    with pytest.raises(ValueError, match="weight of source 1"):
        pipeline(dataset_dir, Source(directory=dataset_dir, weight=0.0))
    other = dataclasses.replace(config, im_end_token_id=17)
    with pytest.raises(md.DatasetError, match="another configuration: its im_end_token_id is"):
        make_pipeline(other, [dataset_dir], batch_size=4)
    backbone = config.backbone
    short = dataclasses.replace(
        backbone, llama=dataclasses.replace(backbone.llama, max_positions=70)
    )
    with pytest.raises(md.DatasetError, match="the Backbone has 70"):
        make_pipeline(dataclasses.replace(config, backbone=short), [dataset_dir], batch_size=4)


@pytest.fixture
def copy(dataset_dir, tmp_path):
    return shutil.copytree(dataset_dir, tmp_path / "copy")


def test_a_damaged_record_is_named(copy, pipeline):
    file = copy / "records-00001.array_record"
    data = bytearray(file.read_bytes())
    at = data.index(b"question_seconds") if b"question_seconds" in data else len(data) // 3
    data[at : at + 4] = b"\x00\x01\x02\x03"
    file.write_bytes(bytes(data))
    with pytest.raises(md.DatasetError, match=r"record [345] of .*copy"):
        for batch, _ in zip(pipeline(copy), range(20), strict=False):
            del batch


def test_damaged_directories(copy, config):
    write_atomically(str(copy / "index.npz"), b"nonsense")
    with pytest.raises(md.DatasetError, match="index.npz is missing or damaged"):
        Dataset(copy, config)
    (copy / "dataset.json").unlink()
    with pytest.raises(md.DatasetError, match="unfinished dataset"):
        Dataset(copy, config)


def test_an_index_of_another_dataset(copy, second_dir, config):
    shutil.copy(second_dir / "index.npz", copy / "index.npz")
    with pytest.raises(md.DatasetError, match="does not belong"):
        Dataset(copy, config)


def test_an_empty_dataset(copy, config):
    metadata = md.read_metadata(copy)
    md.write_metadata(str(copy), dataclasses.replace(metadata, num_records=0, shards=()))
    with pytest.raises(md.DatasetError, match="is empty"):
        Dataset(copy, config)


def test_worker_processes_need_parsed_flags(pipeline):
    with pytest.raises(ValueError, match="parsed absl flags"):
        next(pipeline(reading=Reading(workers=1)))


@pytest.mark.slow
def test_worker_processes_read_the_same(dataset_dir, golden_dir):
    import subprocess
    import sys

    program = f"""
import sys
from absl import app
def main(argv):
    import numpy as np
    from chroma_jax.config import hf
    from chroma_jax.data.pipeline import Reading, make_pipeline
    config = hf.load({str(golden_dir / "config.json")!r})
    def read(**reading):
        batches = make_pipeline(config, [{str(dataset_dir)!r}], batch_size=4, seed=3, reading=Reading(threads=1, prefetch=1, **reading))
        first = [next(batches) for _ in range(5)]
        batches.set_state(dict(batches.get_state(), position=2))
        return first + [next(batches)]
    a, b = read(), read(workers=2)
    for x, y in zip(a, b):
        for m, n in zip(x, y):
            np.testing.assert_array_equal(m, n)
    np.testing.assert_array_equal(b[5].record_ids, b[2].record_ids)
    print("same")
if __name__ == "__main__":
    app.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert "same" in done.stdout, done.stderr


def test_training_finds_what_prepare_stored(golden, config, dataset_dir, hidden_dir):
    """The Reasoner, run by the training step on the pipeline's prompts, gives the states that are in the records."""
    from chroma_jax.training.objectives.dialogue import reasoner_states

    request = dict(batch_size=4, seed=1, reading=READING, num_shapes=1)
    heard = next(make_pipeline(config, [dataset_dir], **request))
    stored = next(make_pipeline(config, [hidden_dir], **request))
    for name in ("record_ids", "text", "frames", "voice_frames", "text_lengths", "frame_lengths"):
        np.testing.assert_array_equal(getattr(heard, name), getattr(stored, name))
    states = np.asarray(jax.jit(reasoner_states)(golden.model, heard))
    for i, length in enumerate(heard.text_lengths):
        want = stored.hidden[i, :length]
        np.testing.assert_allclose(states[i, :length], want, rtol=0, atol=2e-5 * np.abs(want).max())
        assert np.abs(want).max() > 0.1


def test_rows_that_fill_a_batch_count_for_nothing(golden, config, hidden_dir):
    from chroma_jax.training.losses import dialogue_sums

    sums = jax.jit(lambda model, batch: dialogue_sums(model, batch.dialogue(batch.hidden)))
    request = dict(reading=READING, num_shapes=1)
    last = list(make_evaluation(config, [hidden_dir], batch_size=4, **request))[-1]
    got = sums(golden.model, last.needed())
    real = last.record_ids >= 0
    assert real.sum() == 2
    np.testing.assert_array_equal(got.count, np.full(8, last.frame_lengths[real].sum()))
    # The rows may hold anything.
    other = last._replace(
        voice_frames=np.where(real[:, None, None], last.voice_frames, 1),
        text=np.where(real[:, None], last.text, 2),
        hidden=np.where(real[:, None, None], last.hidden, 3.0),
    )
    for a, b in zip(got, sums(golden.model, other.needed()), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()

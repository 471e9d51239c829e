"""Records and metadata: exact round trips, and every kind of damage told."""

import dataclasses
import json
import os
import struct
import zlib

import ml_dtypes
import numpy as np
import pytest
from corpus import same

from chroma_jax.config import tiny
from chroma_jax.data import metadata as md
from chroma_jax.data import records


def make(rng, states=None, sounds=(230, 17), voice=5, **changes):
    fields = dict(
        id="a/b é",
        line=3,
        speaker="Zoë",
        language=None,
        question_seconds=2.47,
        answer_seconds=0.3,
        question_ids=rng.integers(0, 500, 40).astype(np.int32),
        mel=rng.standard_normal((sum(sounds), 128)).astype(np.float32),
        mel_lengths=np.array(sounds, np.int32),
        text=rng.integers(0, 500, 6).astype(np.int32),
        codes=rng.integers(0, 64, (9, 8)).astype(np.int16),
        reference_ids=np.arange(4, dtype=np.int32),
        reference_frames=7,
        voice_ids=np.arange(voice, dtype=np.int32),
        voice_codes=rng.integers(0, 64, (voice, 8)).astype(np.int16),
        hidden=None if states is None else rng.standard_normal((6, 64)).astype(states),
    )
    return records.Record(**(fields | changes))


CASES = {
    "plain": {},
    "text_question": dict(sounds=()),
    "no_voice": dict(voice=0),
    "bfloat16": dict(states=ml_dtypes.bfloat16),
    "float16": dict(states=np.float16),
    "wide_codes": dict(codes=np.full((2, 8), 70000, np.int32), reference_frames=2),
    "no_speaker": dict(speaker=None, language="de"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_round_trip_is_exact(case):
    record = make(np.random.default_rng(0), **case)
    data = records.encode(record)
    same(record, records.decode(data))
    assert records.encode(records.decode(data)) == data


def test_chunks_are_the_encoders():
    record = make(np.random.default_rng(0))
    chunks, lengths = record.chunks(200)
    assert lengths.tolist() == [200, 30, 17]
    np.testing.assert_array_equal(chunks[0], record.mel[:200])
    np.testing.assert_array_equal(chunks[2, :17], record.mel[230:])
    assert not chunks[1, 30:].any()
    silent, none = make(np.random.default_rng(0), sounds=()).chunks(200)
    assert (len(silent), len(none)) == (0, 0)


def test_every_changed_byte_and_every_cut_is_noticed():
    data = records.encode(make(np.random.default_rng(1), sounds=(2,)))
    for at in [*range(0, 600, 7), len(data) - 1, len(data) - 300]:
        changed = bytearray(data)
        changed[at] ^= 0x10
        with pytest.raises(records.RecordError, match="record"):
            records.decode(bytes(changed))
    for size in (0, 3, 12, 15, 100, len(data) - 1):
        with pytest.raises(records.RecordError, match="record"):
            records.decode(data[:size])


def resealed(data, version=records.VERSION, header=lambda h: h, more=b""):
    """The record with a changed header and a right checksum: what a program with a mistake would write."""
    size = struct.unpack_from("<I", data, 8)[0]
    content = json.dumps(header(json.loads(data[12 : 12 + size]))).encode()
    body = struct.pack("<4sII", b"CJXR", version, len(content)) + content + data[12 + size : -4]
    body += more
    return body + struct.pack("<I", zlib.crc32(body))


def drop(key):
    def change(header):
        header["arrays"] = [a for a in header["arrays"] if a[0] != key]
        return header

    return change


def test_well_sealed_nonsense_is_refused():
    data = records.encode(make(np.random.default_rng(1)))
    same(records.decode(resealed(data)), records.decode(data))
    with pytest.raises(records.RecordError, match="version 2"):
        records.decode(resealed(data, version=2))
    with pytest.raises(records.RecordError, match="too many"):
        records.decode(resealed(data, more=b"xxxx"))
    with pytest.raises(records.RecordError, match="damaged"):
        records.decode(resealed(data, header=drop("voice_codes")))
    with pytest.raises(records.RecordError, match="damaged"):
        records.decode(resealed(data, header=lambda h: h | {"scalars": {"id": "x"}}))


BAD = {
    "rank": (dict(text=np.zeros((2, 2), np.int32)), "text must have 1 axes"),
    "dtype": (dict(text=np.zeros(2, np.int64)), "int64"),
    "mel_lengths": (dict(mel_lengths=np.array([5], np.int32)), "mel_lengths"),
    "voice_width": (dict(voice_codes=np.zeros((2, 3), np.int16)), "voice_codes"),
    "reference": (dict(reference_frames=10), "reference_frames"),
    "hidden": (dict(hidden=np.zeros((2, 64), np.float16)), "hidden"),
    "line": (dict(line="3"), "line"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_fields_that_make_no_record(change, message):
    with pytest.raises(records.RecordError, match=message):
        make(np.random.default_rng(0), **change)


def metadata(config, **changes):
    content = dict(
        config=md.config_parts(config),
        codec="c0dec",
        tokenizer="t0k",
        hidden=None,
        settings={},
        key="k",
        num_records=1,
        shards=({"name": "records-00000.array_record", "records": 1, "bytes": 3},),
        speakers=("ä",),
        statistics={"frames": {"max": 3}},
        skipped=(),
    )
    return md.Metadata(**(content | changes))


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "records-00000.array_record").write_bytes(b"abc")
    md.write_metadata(str(tmp_path), metadata(tiny()))
    return tmp_path


def test_metadata_round_trip(directory):
    assert md.read_metadata(directory) == metadata(tiny())
    assert sorted(os.listdir(directory)) == ["dataset.json", "records-00000.array_record"]


def test_metadata_that_cannot_be_used(directory, tmp_path):
    path = directory / "dataset.json"
    good = path.read_text()
    for change, message in (
        (lambda: path.write_text(good.replace('"version": 1', '"version": 9')), "version 9"),
        (lambda: path.write_text(good[: len(good) // 2]), "damaged"),
        (lambda: path.write_text(good.replace("chroma_jax dialogues", "poems")), "not the metadata"),
        (lambda: path.write_text(good.replace('"num_codebooks": 8', '"num_codebooks": 9')), "fingerprint"),
        (lambda: path.unlink(), "unfinished"),
        (lambda: (directory / "records-00000.array_record").write_bytes(b"ab"), "2 bytes"),
        (lambda: (directory / "records-00000.array_record").unlink(), "is missing"),
    ):  # fmt: skip
        change()
        with pytest.raises(md.DatasetError, match=message):
            md.read_metadata(directory)
        path.write_text(good)
    with pytest.raises(md.DatasetError, match="no such"):
        md.read_metadata(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(md.DatasetError, match="is no dataset"):
        md.read_metadata(tmp_path / "empty")


def test_a_dataset_belongs_to_its_model():
    config = tiny()
    replace = dataclasses.replace
    md.check_made_for(metadata(config), config, codec="c0dec", tokenizer="t0k", reasoner="any")
    others = {
        "im_end_token_id": replace(config, im_end_token_id=7),
        "codebook_size": replace(config, codec=replace(config.codec, codebook_size=32)),
        "pad_token_id": replace(config, reasoner=replace(config.reasoner, pad_token_id=8)),
        "chunk_frames": replace(
            config,
            reasoner=replace(config.reasoner, audio=replace(config.reasoner.audio, window=50)),
        ),
        "mel bins": replace(
            config,
            reasoner=replace(
                config.reasoner, audio=replace(config.reasoner.audio, num_mel_bins=80)
            ),
        ),
    }
    for key, other in others.items():
        with pytest.raises(md.DatasetError, match=f"another configuration.*{key}"):
            md.check_made_for(metadata(config), other)
    for what in ("codec", "tokenizer"):
        with pytest.raises(md.DatasetError, match=rf"another (?i:{what}).*, the model's is x"):
            md.check_made_for(metadata(config), config, **{what: "x"})
    hidden = metadata(config, hidden={"dtype": "bfloat16", "width": 64, "reasoner": "r"})
    md.check_made_for(hidden, config, reasoner="r")
    with pytest.raises(md.DatasetError, match="another Reasoner"):
        md.check_made_for(hidden, config, reasoner="s")
    with pytest.raises(md.DatasetError, match="width 32"):
        md.check_made_for(
            metadata(config, hidden={"dtype": "bfloat16", "width": 32, "reasoner": "r"}), config
        )


def test_weights_fingerprint_tells_codecs_apart(golden):
    from flax import nnx

    codec = golden.model.codec
    assert md.weights_fingerprint(codec) == md.weights_fingerprint(codec)
    graphdef, state = nnx.split(codec)
    import jax

    other = jax.tree.map(lambda x: x, state)
    leaves, tree = jax.tree.flatten(other)
    leaves[-1] = leaves[-1] * 1.001
    assert md.weights_fingerprint(nnx.merge(graphdef, tree.unflatten(leaves))) != (
        md.weights_fingerprint(codec)
    )

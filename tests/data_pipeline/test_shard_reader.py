"""Records of many shards, with few files open."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from chroma_jax.data.metadata import DatasetError
from chroma_jax.data.shard_reader import MOST_OPEN, ShardReader

array_record = pytest.importorskip("array_record.python.array_record_module")


def write(path, rows):
    writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()
    return str(path)


def content(shard, record):
    return f"{shard}/{record}".encode() * 100


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve shards of one to three records: files, and all records in order."""
    folder = tmp_path_factory.mktemp("shards")
    rows = [[content(i, j) for j in range(1 + i % 3)] for i in range(12)]
    files = [write(folder / str(i), of) for i, of in enumerate(rows)]
    return files, rows


def reader_of(shards, **more):
    files, rows = shards
    return ShardReader(files, [len(of) for of in rows], **more)


def open_files(files):
    """Which of the files this process has open."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return [file for file in files if file in links]


def test_every_record_in_order(shards):
    reader, rows = reader_of(shards), [row for of in shards[1] for row in of]
    assert [reader[i] for i in range(len(reader))] == rows
    again = pickle.loads(pickle.dumps(reader))
    assert [again[i] for i in (5, 0, len(rows) - 1)] == [rows[i] for i in (5, 0, -1)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
def test_few_files_are_open(shards):
    files, _ = shards
    reader = reader_of(shards, most_open=3)
    assert open_files(files) == []  # none before it is asked
    for i in range(len(reader)):
        assert reader[i]
        assert len(open_files(files)) <= 3
    assert open_files(files) == files[-3:]
    assert reader[0] and open_files(files) == [files[0], *files[-2:]]


def test_threads_share_one(shards):
    rows = [row for of in shards[1] for row in of]
    reader = reader_of(shards, most_open=1)
    wanted = np.random.default_rng(0).integers(0, len(rows), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(reader.__getitem__, wanted))
    assert got == [rows[i] for i in wanted]


def test_a_shard_of_another_length(shards):
    files, rows = shards
    reader = ShardReader(files, [len(rows[0]) + 1, *(len(of) for of in rows[1:])])
    with pytest.raises(
        DatasetError, match=f"{files[0]} is damaged: it has 1 records, it should have 2"
    ):
        reader[0]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
def test_ten_thousand_shards(tmp_path):
    number = 10_000
    files = [write(tmp_path / str(i), [content(i, 0)]) for i in range(number)]
    reader = ShardReader(files, [1] * number)
    before = len(os.listdir("/proc/self/fd"))
    for i in np.random.default_rng(0).permutation(number).tolist():
        assert reader[i] == content(i, 0)
        if i % 500 == 0:
            assert len(os.listdir("/proc/self/fd")) <= before + MOST_OPEN

"""The tfds dataset over the same records: written and read without TensorFlow, nothing lost."""

import sys

import numpy as np
import pytest
from corpus import read_records, same

tfds = pytest.importorskip("tensorflow_datasets")

from chroma_jax.data.tfds_dataset import ChromaDialogues, example_of, record_of  # noqa: E402


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, dataset_dir, hidden_dir):
    root = tmp_path_factory.mktemp("tfds")
    builder = ChromaDialogues(records={"train": dataset_dir, "hidden": hidden_dir}, data_dir=root)
    builder.download_and_prepare()
    return root


@pytest.mark.parametrize("split", ["train", "hidden"])
def test_records_come_back(data_dir, dataset_dir, hidden_dir, split):
    source = tfds.data_source("chroma_dialogues", split=split, data_dir=data_dir)
    want = {r.id: r for r in read_records(dataset_dir if split == "train" else hidden_dir)}
    got = [record_of(source[i]) for i in range(len(source))]
    assert sorted(r.id for r in got) == sorted(want)
    for record in got:
        same(record, want[record.id])
    assert len(tfds.data_source("chroma_dialogues", split=f"{split}[:50%]", data_dir=data_dir)) == 5


def test_grain_reads_it(data_dir):
    import grain

    source = tfds.data_source("chroma_dialogues", split="train", data_dir=data_dir)
    frames = grain.MapDataset.source(source).shuffle(seed=1).map(lambda e: len(e["codes"]))
    assert sorted(frames) == sorted(len(e["codes"]) for e in source)


def test_no_tensorflow(data_dir):
    assert "tensorflow" not in sys.modules


def test_half_precision_states_are_kept(hidden_dir):
    import dataclasses

    import ml_dtypes

    record = read_records(hidden_dir)[0]
    for kind in (np.float16, ml_dtypes.bfloat16):
        half = dataclasses.replace(record, hidden=record.hidden.astype(kind))
        same(record_of(example_of(half)), half)


def test_without_records_there_is_nothing_to_prepare(tmp_path):
    with pytest.raises(ValueError, match="needs records="):
        ChromaDialogues(data_dir=tmp_path).download_and_prepare()

"""Results survive what stops a run: nothing done is done again, and the end is the same to the byte."""

import json
import subprocess
import sys

import pytest

from chroma_jax.evaluation.results import ITEMS, Results, read_summary

KEYS = [f"item/{i}" for i in range(7)]


def work(key):
    return {"value": int(key[-1]) ** 2}


def finished(folder, rows):
    results = Results(folder, {"task": "t"})
    results.finish(rows, {"n": len(rows)}, "table\n")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def whole(tmp_path):
    folder = tmp_path / "whole"
    return finished(folder, Results(folder, {"task": "t"}).fill(KEYS, work))


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_workers_change_nothing(tmp_path, whole, workers):
    folder = tmp_path / "again"
    rows = Results(folder, {"task": "t"}).fill(KEYS, work, workers=workers)
    assert finished(folder, rows) == whole


@pytest.mark.parametrize("tail", [b"", b'{"key": "item/5", "va'], ids=["whole_line", "part_of_one"])
def test_a_stopped_run_goes_on(tmp_path, whole, tail):
    folder = tmp_path / "stopped"

    def until_four(key):
        if key == "item/4":
            raise KeyboardInterrupt
        return work(key)

    with pytest.raises(KeyboardInterrupt):
        Results(folder, {"task": "t"}).fill(KEYS, until_four)
    with open(folder / ITEMS, "ab") as f:
        f.write(tail)
    done = []
    rows = Results(folder, {"task": "t"}).fill(KEYS, lambda k: done.append(k) or work(k))
    assert done == KEYS[4:]
    assert finished(folder, rows) == whole


def test_stale_rows_are_made_anew(tmp_path):
    Results(tmp_path / "r", {}).fill(KEYS, lambda key: {"value": 0})
    results = Results(tmp_path / "r", {})
    rows = results.fill(KEYS, work, stale=lambda row: row["key"] == "item/3")
    assert [r["value"] for r in rows] == [0, 0, 0, 9, 0, 0, 0]
    # The later line counts.
    assert Results(tmp_path / "r", {}).rows["item/3"]["value"] == 9


def test_another_set_up_is_refused(tmp_path):
    Results(tmp_path / "r", {"judge": "a", "n": 3})
    with pytest.raises(ValueError, match=r'another judge \("a", now "b"\): choose another --out'):
        Results(tmp_path / "r", {"judge": "b", "n": 3})


def test_a_damaged_line_is_told(tmp_path):
    Results(tmp_path / "r", {})
    (tmp_path / "r" / ITEMS).write_text("no json\n")
    with pytest.raises(ValueError, match="is damaged"):
        Results(tmp_path / "r", {})


def test_no_summary_yet(tmp_path):
    with pytest.raises(ValueError, match="has no summary.json"):
        read_summary(tmp_path)


def test_a_disk_that_fills(tmp_path):
    """Files may reach 4096 bytes: the run ends with an error that says so, and goes on when there is room."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from chroma_jax.evaluation.results import Results
results = Results({str(tmp_path / "r")!r}, {{}})
try:
    results.fill([f"item/{{i}}" for i in range(100)], lambda key: {{"heard": "x" * 100}})
except ValueError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(
        "cannot be written: File too large; what is there is kept, run again to go on"
    )
    results = Results(tmp_path / "r", {})
    assert 20 < len(results.rows) < 40
    rows = results.fill([f"item/{i}" for i in range(100)], lambda key: {"heard": "x" * 100})
    assert len(rows) == 100
    lines = (tmp_path / "r" / ITEMS).read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [f"item/{i}" for i in range(100)]

"""The task `latency` on the tiny checkpoint: all clocks, the stages, two streams at once."""

import json

import pytest

from chroma_jax.evaluation import latency, results
from chroma_jax.evaluation.dialogue import Question


@pytest.mark.slow  # compiles replies, listening, a batch of two and the stages; benchmarks' tests run the parts
def test_latency(golden, voice, question_path, tmp_path):
    asked = [Question("q", ((question_path, None),))]
    found = latency.run(
        asked, tmp_path / "out", golden, voice, system="tiny", how={}, max_seconds=0.6, repeats=2, drop=1,
        streams=[2], stage_seconds=0.6,
    )  # fmt: skip
    rows = results.read_rows(tmp_path / "out")
    single = [r for r in rows if r["key"].startswith("run/")]
    assert [r["key"] for r in single] == [f"run/{w}/q/{i}" for w in ("whole", "spoken") for i in (0, 1)]  # fmt: skip
    for r in single:
        assert 0 < r["first_text"] <= r["first_frame"] <= r["first_sound"] <= r["end"]
        assert r["seconds"] == pytest.approx(0.64, abs=0.01)
        assert r["rtf"] == pytest.approx(r["end"] / r["seconds"], rel=0.01)
        assert r["underrun"] >= r["stall"] >= 0
    assert [len(r["streams"]) for r in rows if r["key"].startswith("streams/")] == [2, 2]
    one, several, stages = found["tables"]
    assert [r["n"] for r in one["rows"]] == ["2", "2"]
    assert several["rows"][0]["streams"] == "2"
    assert [r["stage"] for r in stages["rows"]] == ["Reasoner", "Backbone", "Decoder", "Codec"]
    assert [r["count"] for r in stages["rows"]] == ["4", "8", "8", "8"]
    assert "cpu" in found["made"]["device"]
    json.dumps(found)


def test_it_wants_sound(golden, voice, tmp_path):
    with pytest.raises(
        ValueError, match="latency wants spoken questions of one turn, and t is none"
    ):
        latency.run([Question("t", ((None, "text"),))], tmp_path, golden, voice, system="x", how={})

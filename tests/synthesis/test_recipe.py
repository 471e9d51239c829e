"""Every file of configs/synthesis/ is a synthesis that can be begun, and says its command."""

import pathlib
import runpy

import pytest

from chroma_jax.synthesis.config import SynthesisConfig

pytest.importorskip("ml_collections")
FILES = sorted((pathlib.Path(__file__).parents[2] / "configs" / "synthesis").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_configuration_is_whole(path):
    config = SynthesisConfig.from_dict(runpy.run_path(str(path))["get_config"]())
    for split in ("train", "validation"):
        answering = [voice for voice in config.voices if voice.can("answers", split)]
        assert len(answering) >= 5
    # Who asks in validation is not only who asks in training.
    assert [v for v in config.voices if v.says == "questions" and v.split == "validation"]
    assert f"--config=configs/synthesis/{path.name} --out=" in path.read_text().split('"""')[1]

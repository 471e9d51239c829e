"""The golden checkpoint, to change."""

import shutil

import pytest
from random_checkpoints import GOLDEN


@pytest.fixture
def golden(tmp_path):
    """A copy of the golden checkpoint that a test may change."""
    directory = tmp_path / "golden"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name, directory / name)
    return directory

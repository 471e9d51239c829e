"""`python -m chroma_jax.synthesize`: what it wants, and that it makes and tells."""

import pytest
from absl import flags

from chroma_jax import cli
from chroma_jax import synthesize as command

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({values!r})
"""


@pytest.fixture
def parse(tmp_path, values):
    """Command-line arguments -> flags, with a configuration of six rows."""
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(values={**values, "rows": dict(train=6, validation=0)}))

    def parsed(*arguments):
        given = flags.FlagValues()
        command.define_flags(given)
        given(["synthesize", *(a.replace("CONFIG", str(file)) for a in arguments)])
        return given

    return parsed


@pytest.mark.parametrize(
    ("arguments", "missing"), [((), "config"), (("--config=CONFIG",), "out")], ids=["config", "out"]
)
def test_what_is_missing(parse, arguments, missing):
    with pytest.raises(cli.CommandError, match=f"--{missing} is missing"):
        command.main(parse(*arguments))


def test_it_makes_and_tells(parse, tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    with pytest.raises(ValueError, match="no row of 0 stays"):
        command.main(parse("--config=CONFIG", out, "--so_far"))
    command.main(parse("--config=CONFIG", out))
    told = capsys.readouterr().out
    assert told.startswith("train: ") and "of 6 rows stay" in told
    command.main(parse("--config=CONFIG", out, "--so_far"))
    assert capsys.readouterr().out == told
    with pytest.raises(ValueError, match="begun with other settings: seed was 0, now it is 1"):
        command.main(parse("--config=CONFIG", out), changes=[("seed", "1")])


def test_a_key_that_is_wrong(parse, tmp_path):
    with pytest.raises(ValueError, match="shard_size must be at least 1"):
        command.main(parse("--config=CONFIG", f"--out={tmp_path}"), changes=[("shard_size", "0")])
    with pytest.raises(ValueError, match="no key writer.knid; near it are"):
        command.main(parse("--config=CONFIG", f"--out={tmp_path}"), changes=[("writer.knid", "x")])


def test_keys_that_the_file_does_not_name(parse, tmp_path):
    asked = [("writer.kind", "endpoint"), ("writer.model", "m"), ("writer.url", "http://127.0.0.1:9/v1"), ("writer.questions", str(tmp_path / "none.txt"))]  # fmt: skip
    with pytest.raises(ValueError, match="none.txt: no such file"):
        command.main(parse("--config=CONFIG", f"--out={tmp_path / 'out'}"), changes=asked)

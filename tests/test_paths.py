"""Paths as users write them, and files that appear whole or not at all."""

import os
import threading

import pytest

from chroma_jax import paths


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("~", "HOME"),
        ("~/a b", "HOME/a b"),
        ("a/~/b", "a/~/b"),
        ("./~", "./~"),
        ("gs://bucket/~/x", "gs://bucket/~/x"),
        ("FlashLabs/Chroma-4B", "FlashLabs/Chroma-4B"),
        ("", ""),
    ],
)
def test_expand(given, want, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.expand(given) == want.replace("HOME", str(tmp_path))


def test_within(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert paths.within(tmp_path / "link" / "file", tmp_path / "a")
    assert paths.within(tmp_path / "a", tmp_path / "a")
    assert not paths.within(tmp_path / "ab", tmp_path / "a")


def test_many_writers_of_one_file_never_meet(tmp_path):
    path = str(tmp_path / ("n" * 255))
    failed = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                with paths.replacing(path) as temporary, open(temporary, "w") as f:
                    f.write(str(number) * 1000)
        except OSError as e:
            failed.append(e)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(tmp_path) == ["n" * 255]
    with open(path) as f:
        content = f.read()
    assert content == content[0] * 1000


def test_what_fails_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), paths.replacing(str(path)) as temporary:
        open(temporary, "w").close()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "old"

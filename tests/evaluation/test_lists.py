"""meta.lst of all lengths, JSONL, and one line for whatever is wrong with a list."""

import json

import pytest

from chroma_jax.evaluation.lists import Item, read_list


@pytest.fixture
def folder(tmp_path):
    for name in ("p.wav", "r.wav"):
        (tmp_path / name).write_bytes(b"sound")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("a|Hi.", dict()),
        ("a|Hi.|p.wav", dict(prompt="p.wav")),
        ("a|Said.|p.wav|Hi.", dict(prompt="p.wav", prompt_text="Said.")),
        ("a|Said.|p.wav|Hi.|r.wav", dict(prompt="p.wav", prompt_text="Said.", recording="r.wav")),
    ],
    ids=["two", "three", "four", "five"],
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n\r\n"], ids=["cut", "unix", "windows"])
def test_meta_lst(folder, line, want, end):
    (folder / "meta.lst").write_bytes((line + end).encode())
    for key in ("prompt", "recording"):
        if key in want:
            want = want | {key: folder / want[key]}
    assert read_list(folder / "meta.lst") == [Item("a", "Hi.", **want)]


def test_jsonl(folder):
    line = {"name": "a", "text": "Hi.", "prompt": "p.wav", "speaker": "s", "recording": None}
    (folder / "l.jsonl").write_text(json.dumps(line) + "\n\n" + '{"name": "b", "text": "Ho."}')
    assert read_list(folder / "l.jsonl") == [
        Item("a", "Hi.", folder / "p.wav", speaker="s"),
        Item("b", "Ho."),
    ]


BAD = {
    "empty": ("", "has no lines"),
    "one_field": ("a|Hi.\nwords\n", "meta.lst:2: wanted 2 to 5 fields between |"),
    "six_fields": ("a|b|p.wav|d|r.wav|f", "got 6"),
    "no_text": ("a|said|p.wav| ", "meta.lst:1: a has no text"),
    "twice": ("a|Hi.\nb|Ho.\na|Ha.", "meta.lst:3: the name a is on line 1 already"),
    "a_path": ("../a|Hi.", "'../a' cannot name a file"),
    "no_prompt": ("a|Said.|q.wav|Hi.\nb|Said.|s.wav|Hi.", "2 of its sound files are not there, as .*q.wav"),
    "no_recording": ("a|Said.|p.wav|Hi.|q.wav", "1 of its sound files"),
    "not_utf8": ("a|H\udcff", "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_lists_are_told_in_one_line(folder, content, message):
    (folder / "meta.lst").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as told:
        read_list(folder / "meta.lst")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "l.jsonl:1: is not JSON"),
        ("[1]", "wanted an object, got list"),
        ('{"name": "a"}', "has no text"),
        ('{"name": "a", "text": 3}', "text must be text, got int"),
        ('{"name": "a", "text": "b", "voice": "c"}', "unknown key 'voice'"),
    ],
    ids=["json", "object", "text", "kind", "key"],
)
def test_bad_json_is_told_in_one_line(folder, line, message):
    (folder / "l.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_list(folder / "l.jsonl")


@pytest.mark.parametrize("name", ["absent.lst", "."], ids=["absent", "directory"])
def test_no_list(folder, name):
    with pytest.raises(ValueError, match="no such file|is a directory"):
        read_list(folder / name)

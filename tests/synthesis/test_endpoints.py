"""Requests to servers: a real one on this machine, which refuses, is out of breath, or answers."""

import pytest

from chroma_jax.synthesis import endpoints


def test_it_posts_json_with_the_key(serve, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    server = serve((200, b"yes"))
    assert endpoints.post(f"{server.url}/x", {"a": 1}, "A_KEY") == b"yes"
    assert server.asked == [("/v1/x", "Bearer secret", {"a": 1})]


def test_it_tries_again(serve):
    server = serve((503, b""), (429, b""), (200, b"at last"))
    assert endpoints.post(f"{server.url}/x", {}) == b"at last"
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("answers", "error", "message", "asked"),
    [
        ([(404, b"no such model")], ValueError, r"refuses the request \(404\): no such model", 1),
        ([(503, b"")], OSError, "still answers 503 after 5 tries", 5),
    ],
)
def test_it_gives_up(serve, answers, error, message, asked):
    server = serve(*answers)
    with pytest.raises(error, match=message):
        endpoints.post(f"{server.url}/x", {})
    assert len(server.asked) == asked


def test_nobody_there(monkeypatch):
    monkeypatch.setattr(endpoints, "_FIRST_WAIT", 0.001)
    with pytest.raises(OSError, match="cannot be reached"):
        endpoints.post("http://127.0.0.1:9/v1/x", {})


def test_a_key_that_is_not_set():
    with pytest.raises(ValueError, match="NO_SUCH_KEY, the key of http://x, is not set"):
        endpoints.post("http://x", {}, "NO_SUCH_KEY")

"""The endpoint of a judge, on a loopback server that answers, fails, stalls or talks nonsense."""

import http.server
import json
import threading

import pytest

from chroma_jax.evaluation.endpoint import Endpoint, EndpointError


@pytest.fixture
def serve():
    """serve(reply) -> (address, requests): `reply(body)` gives (status, texts) or bytes; None stalls."""
    servers = []

    def start(reply):
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append({**body, "path": self.path, "key": self.headers["Authorization"]})
                given = reply(body)
                if given is None:
                    stop.wait(5)
                    return
                status, texts = given
                content = texts if isinstance(texts, bytes) else json.dumps({"choices": [{"message": {"content": t}} for t in texts]}).encode()  # fmt: skip
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        stop = threading.Event()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append((server, stop))
        return f"http://127.0.0.1:{server.server_port}/v1", requests

    yield start
    for server, stop in servers:
        stop.set()
        server.shutdown()
        server.server_close()


def endpoint(address, **more):
    return Endpoint(address, "judge", **{"waits": (0.0, 0.0), "timeout": 2.0, **more})


def test_a_score_is_the_mean_of_three_votes(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "word")
    address, requests = serve(lambda body: (200, ["5", "Score: 4", "3"]))
    judge = endpoint(address, key_variable="JUDGE_KEY")
    assert judge.score("Why?", "Because.", "It is so.") == 80.0
    (asked,) = requests
    assert (asked["path"], asked["key"], asked["n"]) == ("/v1/chat/completions", "Bearer word", 3)
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0.5, 0.95, 1024)
    for part in ("Why?", "Because.", "It is so."):
        assert part in asked["messages"][0]["content"]


def test_servers_that_give_one_choice_are_asked_again(serve):
    answers = iter(["1", "2", "3"])
    address, requests = serve(lambda body: (200, [next(answers)]))
    assert endpoint(address).score("a", "b") == 40.0
    assert [r["n"] for r in requests] == [3, 2, 1]


def test_blank_answers_are_not_asked_about(serve):
    address, requests = serve(lambda body: (200, ["5"]))
    assert endpoint(address).score("a", " ") == 0.0
    assert not endpoint(address).agrees("a", "", "c")
    assert not requests


@pytest.mark.parametrize(("votes", "want"), [(["Yes", "no.", "yes"], True), (["No"] * 3, False)])
def test_agrees_by_majority(serve, votes, want):
    address, _ = serve(lambda body: (200, votes))
    assert endpoint(address).agrees("a", "b", "c") is want


def test_what_passes_is_tried_again(serve):
    statuses = iter([503, 429, 200])
    address, requests = serve(lambda body: (next(statuses), ["4"] * 3))
    assert endpoint(address).score("a", "b") == 80.0
    assert len(requests) == 3


FAILURES = {
    "always_busy": (lambda body: (503, []), r"503 .*run again to go on", 3),
    "no_key": (lambda body: (401, []), r"401 .*run again to go on", 1),
    "no_score": (lambda body: (200, ["hm"]), "does not answer with a score: 'hm'", 6),
    "no_chat": (lambda body: (200, b"<html>"), "is no chat endpoint", 1),
}


@pytest.mark.parametrize(("reply", "message", "asked"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_are_told_in_one_line(serve, reply, message, asked):
    address, requests = serve(reply)
    with pytest.raises(EndpointError, match=message) as told:
        endpoint(address).score("a", "b")
    assert "\n" not in str(told.value)
    assert len(requests) == asked


def test_one_that_stalls(serve):
    address, _ = serve(lambda body: None)
    with pytest.raises(EndpointError, match="timed out"):
        endpoint(address, timeout=0.2, waits=()).score("a", "b")


def test_nobody_there():
    with pytest.raises(EndpointError, match="refused"):
        endpoint("http://127.0.0.1:9/v1", waits=()).score("a", "b")


def test_an_address_that_is_none():
    with pytest.raises(ValueError, match="wants http:// or https://"):
        Endpoint("localhost:8000", "judge")

"""A synthesis whose voices are tones: made in milliseconds, heard by judges that are made up too."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from chroma_jax.synthesis import endpoints

TONES = '''
import numpy as np, random

def _tone(text, seed, pitch):
    """A tone a letter, and a little noise of the seed; "mute" says nothing."""
    if "mute" in text:
        return np.zeros(4000), 16000
    length = 900
    t = np.arange(length) / 16000
    parts = [np.sin(2 * np.pi * (pitch + 7 * (ord(c) % 32)) * t) for c in text]
    wave = 0.3 * np.concatenate(parts)
    return wave + 0.001 * np.random.default_rng(seed).standard_normal(len(wave)), 16000

def low(text, seed):
    return _tone(text, seed, 120)

def high(text, seed):
    return _tone(text, seed, 240)

def other(text, seed):
    return _tone(text, seed, 180)
'''


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """The directory of a module `tones` with three voices."""
    folder = tmp_path_factory.mktemp("tones")
    (folder / "tones.py").write_text(TONES)
    return folder


@pytest.fixture
def values(tones, monkeypatch):
    """A configuration as nested mappings, of 24 rows in shards of 4."""
    monkeypatch.syspath_prepend(str(tones))
    voices = [
        dict(name=name, speaker="python", options=dict(call=f"tones:{name}"), licence="none needed")
        for name in ("low", "high", "other")
    ]
    off = dict.fromkeys(
        (
            "min_pace",
            "max_pace",
            "pace_spread",
            "max_wer",
            "min_similarity",
            "min_mos",
            "mos_drop",
            "room",
        )
    )
    return dict(
        rows=dict(train=18, validation=6),
        writer=dict(kind="world", reading=0.2),
        voices=voices,
        sound=dict(rate=16000, speed=0.1, noise=0.5, gain=6.0),
        filters=dict(off),
        shard_size=4,
    )


class Server(http.server.ThreadingHTTPServer):
    """Keeps what it was asked; answers from a list of (status, bytes), the last one for ever."""

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked, self.answers = [], answers
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.asked.append((self.path, self.headers.get("Authorization"), json.loads(content)))
        status, answer = server.answers[min(len(server.asked), len(server.answers)) - 1]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(endpoints, "_FIRST_WAIT", 0.001)
    running = []

    def start(*answers):
        server = Server(answers)
        running.append(server)
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()  # fmt: skip
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()

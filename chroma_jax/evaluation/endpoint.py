"""A judge behind any OpenAI-compatible endpoint: open answers on a scale of 1 to 5, closed ones by yes or no."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any

_WAITS = (1.0, 4.0, 10.0)  # seconds before each new try
_AGAIN = (408, 409, 429, 500, 502, 503, 504)
VOTES = 3
_RUBRIC = {
    1: "wrong, empty, or beside the question",
    2: "touches the question, but mostly wrong or of no use",
    3: "answers the question in part, or with clear mistakes",
    4: "right and useful, with small flaws",
    5: "right, complete and fit to be heard",
}


class EndpointError(ValueError):
    """The endpoint did not answer, or not as it should; what was scored before is kept."""


class Endpoint:
    """Asks `POST <url>/chat/completions`.

    Args:
      url: of the API, as https://api.openai.com/v1; a local server does as well.
      model: its name there.
      key_variable: the environment variable that holds the key; none is sent where it is empty.
      timeout: seconds for one answer.
    """

    def __init__(
        self,
        url: str,
        model: str = "gpt-4o-mini",
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        waits: tuple[float, ...] = _WAITS,
    ):
        if not re.match(r"https?://", url):
            raise ValueError(f"a judge's address wants http:// or https://, got {url!r}")
        self.url, self.model = url.rstrip("/"), model
        self._key, self._timeout, self._waits = os.environ.get(key_variable), timeout, waits
        self.name, self.scale = f"{model} at {self.url}", "1 to 5, × 20"
        self.digest = hashlib.sha256(repr((_RUBRIC, _PROMPTS)).encode()).hexdigest()[
            :12
        ]  # of the prompts

    def score(self, question: str, answer: str, reference: str | None = None) -> float:
        """0 to 100: the mean of three votes from 1 to 5, times 20. A blank answer is not asked about: 0."""
        if not answer.strip():
            return 0.0
        rubric = "\n".join(f"{points}: {text}" for points, text in _RUBRIC.items())
        votes = self._votes(
            _PROMPTS["score"].format(
                rubric=rubric,
                question=question,
                answer=answer,
                reference=f"\n[Reference]\n{reference}" if reference else "",
            ),
            r"[1-5]",
        )
        return 20.0 * sum(map(int, votes)) / len(votes)

    def agrees(self, question: str, answer: str, reference: str) -> bool:
        """Whether most of three votes say that the answer agrees with the reference. A blank answer does not."""
        if not answer.strip():
            return False
        votes = self._votes(
            _PROMPTS["agrees"].format(question=question, answer=answer, reference=reference),
            r"\b(?:yes|no)\b",
        )
        return sum(v.lower() == "yes" for v in votes) * 2 > len(votes)

    def _votes(self, prompt: str, pattern: str) -> list[str]:
        """Three that fit the pattern. Servers that give fewer choices than asked for are asked again."""
        votes, texts, asked = [], [""], 0
        while len(votes) < VOTES:
            if asked >= 2 * VOTES:
                raise EndpointError(f"{self.name}: does not answer with a score: {texts[0][:60]!r}")
            texts, asked = self._ask(prompt, VOTES - len(votes)), asked + 1
            votes += [m[0] for t in texts if (m := re.search(pattern, t, re.IGNORECASE))]
        return votes[:VOTES]

    def _ask(self, prompt: str, count: int) -> list[str]:
        body = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.5, "top_p": 0.95, "n": count, "max_tokens": 1024,
        }  # fmt: skip
        reason = ""
        for wait in (*self._waits, None):
            try:
                return self._post(body)
            except urllib.error.HTTPError as e:
                reason = f"{e.code} {e.reason}"
                if e.code not in _AGAIN:
                    break
            except (OSError, http.client.HTTPException) as e:
                reason = str(getattr(e, "reason", e)) or type(e).__name__
            if wait is not None:
                time.sleep(wait)
        raise EndpointError(f"{self.name}: {reason}; what is scored is kept, run again to go on")

    def _post(self, body: dict[str, Any]) -> list[str]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=self._timeout) as response:
            content = response.read()
        try:
            return [c["message"]["content"] or "" for c in json.loads(content)["choices"]]
        except (ValueError, KeyError, TypeError) as e:
            raise EndpointError(f"{self.name}: is no chat endpoint: {content[:60]!r}") from e


_PROMPTS = {
    "score": (
        "You rate the answers of a spoken assistant. The answer was transcribed from its voice: forgive spelling and "
        "punctuation.\n\nPoints:\n{rubric}\n\n[Question]\n{question}\n{reference}\n\n[Answer]\n{answer}\n\n"
        "Reply with the number of points alone."
    ),
    "agrees": (
        "You check the answer of a spoken assistant, transcribed from its voice, against a reference.\n\n[Question]\n"
        "{question}\n\n[Reference]\n{reference}\n\n[Answer]\n{answer}\n\nDoes the answer say what the reference says? "
        "Reply with Yes or No alone."
    ),
}

"""One request to a server, tried again when the network or the server is out of breath."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

_TRIES, _FIRST_WAIT, _TIMEOUT = 5, 1.0, 300.0  # seconds
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)


def post(url: str, content: Any, key: str = "") -> bytes:
    """Posts JSON and returns the answer's bytes.

    Args:
      url: where.
      content: what JSON can hold.
      key: the environment variable that holds the key; "" for none.

    Raises:
      ValueError: the key is not set, or the server refuses the request.
      OSError: the server cannot be reached, or stays out of breath.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        if not os.environ.get(key):
            raise ValueError(f"the environment variable {key}, the key of {url}, is not set")
        headers["Authorization"] = f"Bearer {os.environ[key]}"
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    for number in range(_TRIES):
        last = number == _TRIES - 1
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                return answer.read()
        except urllib.error.HTTPError as e:
            if e.code not in _AGAIN:
                said = e.read(300).decode(errors="replace").replace("\n", " ")
                raise ValueError(f"{url} refuses the request ({e.code}): {said[:120]}") from e
            if last:
                raise OSError(f"{url} still answers {e.code} after {_TRIES} tries") from e
        except (urllib.error.URLError, TimeoutError, ConnectionError) as e:
            if last:
                raise OSError(f"{url} cannot be reached: {getattr(e, 'reason', e)}") from e
        time.sleep(_FIRST_WAIT * 2**number)
    raise AssertionError("unreachable")

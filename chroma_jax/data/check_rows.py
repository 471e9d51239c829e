"""Which rows of a manifest cannot be used, found before work starts and told to the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor

from chroma_jax.audio.prompt import Processor
from chroma_jax.data.manifest import BadRow, Row, bad_row, check_files, load_row
from chroma_jax.data.voices import VoiceLimits
from chroma_jax.messages import shorten

_SHOWN = 20  # bad rows that are told one by one


class BadRowsError(ValueError):
    """Rows that cannot be used, with on_bad_row "fail". `rows` has all of them."""

    def __init__(self, rows: Sequence[BadRow], manifest: str):
        first = rows[0]
        super().__init__(
            shorten(
                f"{shorten(manifest, 60)}: {len(rows)} bad rows, the first on line {first.line}: {first.reason} "
                "(--on_bad_row=skip leaves such rows out)"
            )
        )
        self.rows = list(rows)


def find_bad_rows(
    rows: Iterable[Row],
    processor: Processor,
    limits: VoiceLimits,
    *,
    full: bool,
    pool: Executor,
    checked: Callable[[], object],
) -> list[BadRow]:
    """Rows that cannot be used, in order.

    Args:
      rows: of a manifest.
      processor: what the rows will go through.
      limits: of voice prompts.
      full: reads all sound; otherwise only looks whether it is there.
      pool: where rows are looked at.
      checked: called after each row.
    """

    def look(row: Row) -> BadRow | None:
        try:
            if full:
                load_row(row, processor, limits)
            else:
                check_files(row)
            return None
        except (ValueError, OSError) as e:
            return bad_row(row, e)
        finally:
            checked()

    return [found for found in pool.map(look, rows) if found is not None]


def tell_bad_rows(
    rows: Iterable[BadRow], manifest: str, say: Callable[[str], None], *, fail: bool
) -> None:
    """Tells bad rows, a line each. Raises BadRowsError if there are any and they are to `fail`."""
    rows = sorted(rows)
    for row in rows[:_SHOWN]:
        say(f"{manifest}:{row.line}: {row.reason}")
    if len(rows) > _SHOWN:
        say(f"... and {len(rows) - _SHOWN} more")
    if rows and fail:
        raise BadRowsError(rows, manifest)

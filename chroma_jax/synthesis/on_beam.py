"""The shards as a pipeline of Apache Beam: each is one element, made by whichever worker has it.

The workers share the directory, a path on a disk or a mounted file system. A shard is written aside and renamed, so a bundle that Beam tries
again, or runs twice, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from chroma_jax.synthesis.config import SynthesisConfig
from chroma_jax.synthesis.shards import Shard


class MakeShards(beam.DoFn):
    """Makes shards; writer, voices and judges are opened once in a worker."""

    def __init__(self, directory: str, config: SynthesisConfig):
        self._directory, self._config = directory, config
        self._workshop = None

    def setup(self) -> None:
        """Opens the workshop."""
        from chroma_jax.synthesis.runner import Workshop

        self._workshop = Workshop(self._directory, self._config)

    def process(self, shard: tuple):
        """One shard."""
        shard = Shard(*shard)
        self._workshop.make(shard, beam.metrics.Metrics.counter("synthesis", "rows").inc)
        yield shard.file


def run(
    directory: str,
    config: SynthesisConfig,
    todo: Sequence[Shard],
    runner: str,
    options: Sequence[str],
) -> None:
    """Makes the shards on a runner of Beam. `options` are Beam's own, such as --direct_num_workers=2."""
    flags = [f"--runner={runner}", *options]
    if runner == "DirectRunner" and not any(o.startswith("--direct_running_mode") for o in options):
        flags.append("--direct_running_mode=multi_processing")
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        _ = (
            pipeline
            | "shards" >> beam.Create([tuple(shard) for shard in todo])
            | "spread" >> beam.Reshuffle()
            | "make" >> beam.ParDo(MakeShards(directory, config))
        )

"""What streams do, as Prometheus metrics: ``pip install 'defense-vae-fast[prometheus]'``.

::

    from prometheus_client import REGISTRY, start_http_server
    from defense_vae_fast.integrations.prometheus import StreamCollector

    REGISTRY.register(StreamCollector({"entrance": stream}))
    start_http_server(9000)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from defense_vae_fast.stream import Stream

_PREFIX = "defense_vae_fast_stream_"
_OCTAVES = range(6, 24)  # 64 microseconds to 8.4 seconds


class StreamCollector(Collector):
    """The figures of :meth:`Stream.stats`, read whenever the registry is scraped; the streams themselves do nothing.

    Metrics, each with the label ``stream``: counters ``frames_in_total``, ``frames_out_total`` and
    ``frames_dropped_total`` (with the label ``cause``), gauges ``frames_in_progress`` and ``sources``, histograms
    ``waiting_seconds`` and ``computing_seconds`` (of the frames that came out) and ``batch_size``. All begin with
    ``defense_vae_fast_stream_``.

    Args:
        streams: by the value of the label ``stream``; looked at anew at each scrape.
    """

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self._streams = streams

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        stream_only = ["stream"]
        frames_in = CounterMetricFamily(_PREFIX + "frames_in", "Frames put.", labels=stream_only)
        frames_out = CounterMetricFamily(_PREFIX + "frames_out", "Frames purified.", labels=stream_only)
        dropped = CounterMetricFamily(
            _PREFIX + "frames_dropped", "Frames without a result.", labels=["stream", "cause"]
        )
        progress = GaugeMetricFamily(
            _PREFIX + "frames_in_progress", "Frames that wait or are computed.", labels=stream_only
        )
        sources = GaugeMetricFamily(_PREFIX + "sources", "Sources with frames in progress.", labels=stream_only)
        sizes = HistogramMetricFamily(_PREFIX + "batch_size", "Frames of a batch.", labels=stream_only)
        times = {
            name: HistogramMetricFamily(f"{_PREFIX}{name}_seconds", text, labels=stream_only)
            for name, text in (
                ("waiting", "From put to the start of a frame's batch."),
                ("computing", "From the start of a frame's batch to its end."),
            )
        }
        for name, stream in list(self._streams.items()):
            stats = stream.stats()
            frames_in.add_metric([name], stats["frames_in"])
            frames_out.add_metric([name], stats["frames_out"])
            for cause, count in stats["dropped"].items():
                dropped.add_metric([name, cause], count)
            progress.add_metric([name], stats["in_progress"])
            sources.add_metric([name], stats["sources"])
            batches = stats["batch_sizes"]
            so_far = accumulate(batches.values())
            buckets = [(str(float(size)), float(count)) for size, count in zip(batches, so_far, strict=True)]
            total = sum(size * count for size, count in batches.items())
            sizes.add_metric([name], [*buckets, ("+Inf", float(sum(batches.values())))], total)
            for which, (edges, count, seconds) in stream.histograms(_OCTAVES).items():
                within = [(str(edge), float(number)) for edge, number in edges]
                times[which].add_metric([name], [*within, ("+Inf", float(count))], seconds)
        yield from (frames_in, frames_out, dropped, progress, sources, sizes, *times.values())

"""The metrics of streams, read back as a Prometheus server reads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from test_images import pixels

from defense_vae_fast import Purifier
from defense_vae_fast.checkpoint import Checkpoint
from defense_vae_fast.integrations.prometheus import StreamCollector
from defense_vae_fast.stream import Stream

PREFIX = "defense_vae_fast_stream_"


def scrape(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """(name without prefix, label values except the stream's ...): value, of the stream "a"."""
    values = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            assert sample.name.startswith(PREFIX)
            labels = dict(sample.labels)
            if labels.pop("stream") == "a":
                values[(sample.name.removeprefix(PREFIX), *labels.values())] = sample.value
    return values


def test_the_metrics_are_the_stats(checkpoint: Checkpoint) -> None:
    registry = CollectorRegistry()
    streams: dict[str, Stream] = {}
    registry.register(StreamCollector(streams))
    assert scrape(registry) == {}
    with Purifier(checkpoint, engine="openvino") as purifier, purifier.stream(max_batch=4) as stream:
        streams["a"] = stream
        streams["b"] = purifier.stream()
        for ticket in [stream.put(frame, source=index % 3) for index, frame in enumerate(pixels((30, 28, 28, 1)))]:
            ticket.result(60)
        with pytest.raises(ValueError, match="expected"):
            stream.put(np.zeros((3, 3), np.uint8))
        stream.put(pixels((28, 28)), deadline_ms=0).result(60)
        values, stats = scrape(registry), stream.stats()
    assert values["frames_in_total",] == 32 == stats["frames_in"]
    assert values["frames_out_total",] == 30 == stats["frames_out"]
    assert {key[1]: value for key, value in values.items() if key[0] == "frames_dropped_total"} == stats["dropped"]
    assert stats["dropped"] == {"invalid": 1, "deadline": 1}
    assert values["frames_in_progress",] == values["sources",] == 0
    for name in ("waiting_seconds", "computing_seconds"):
        buckets = [value for key, value in values.items() if key[0] == f"{name}_bucket"]
        assert buckets == sorted(buckets)
        assert buckets[-1] == values[f"{name}_count",] == 30
        assert values[f"{name}_sum",] > 0
    assert values["batch_size_sum",] == 30
    assert values["batch_size_bucket", "+Inf"] == sum(stats["batch_sizes"].values())
    for size in stats["batch_sizes"]:
        within = sum(count for other, count in stats["batch_sizes"].items() if other <= size)
        assert values["batch_size_bucket", str(float(size))] == within


def test_it_is_an_extra() -> None:
    """The library works where prometheus_client is not installed."""
    code = """
import sys
sys.modules["prometheus_client"] = None
from defense_vae_fast import Purifier
import defense_vae_fast.integrations
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=120)

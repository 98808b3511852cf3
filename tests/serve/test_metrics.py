"""The text for Prometheus."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
from scripted_models import Script, ScriptedPipeline, ScriptedStream

import visprune.serve.metrics as module
from visprune.errors import MissingExtraError
from visprune.serve.errors import Refusal
from visprune.serve.metrics import Metrics

parser = pytest.importorskip("prometheus_client.parser")


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, which stand in the order of their names."""
    text, kind = metrics.render()
    assert kind.startswith("text/plain")
    families = parser.text_string_to_metric_families(text.decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def caches(hits: int, misses: int, size: int) -> SimpleNamespace:
    cache = SimpleNamespace(hits=hits, misses=misses, bytes=size)
    return SimpleNamespace(pictures=cache, prefixes=SimpleNamespace(hits=2 * hits, misses=0, bytes=2 * size))


def test_what_is_counted_can_be_read():
    metrics = Metrics()
    metrics.occupied(3, 2, 1000)
    metrics.refused("queue_full")
    metrics.refused("queue_full")
    metrics.started("m", 0.03)
    metrics.first_token("m", 0.2)
    metrics.later_token("m", 0.02)
    metrics.later_token("m", 0.04)
    stream = ScriptedStream(ScriptedPipeline(), Script("a", tokens=3, tokens_in=50))
    while stream.step() is not None:
        pass
    metrics.ended("m", stream.result, 3)
    metrics.ended("m", Refusal(504, "request_timeout", "Too late."), 2)
    found = samples(metrics)
    assert found["visprune_queued_requests",] == 3
    assert found["visprune_active_requests",] == 2
    assert found["visprune_conversation_memory_bytes",] == 1000
    assert found["visprune_refusals_total", "queue_full"] == 2
    assert found["visprune_queue_seconds_sum", "m"] == 0.03
    assert found["visprune_first_token_seconds_count", "m"] == 1
    assert found["visprune_later_token_seconds_sum", "m"] == pytest.approx(0.06)
    assert found["visprune_requests_total", "eos", "m"] == 1
    assert found["visprune_requests_total", "request_timeout", "m"] == 1
    assert found["visprune_generated_tokens_total", "m"] == 5
    assert found["visprune_prompt_tokens_total", "m"] == 50
    assert found["visprune_prompt_tokens_cached_total", "m"] == 7
    assert found["visprune_visual_tokens_kept_total", "m"] == 4
    assert found["visprune_visual_tokens_dropped_total", "m"] == 12


def test_lookups_of_a_cache_count_from_the_first_look_on():
    metrics = Metrics()
    metrics.cached("m", caches(hits=5, misses=1, size=10))  # of the warm-up
    metrics.cached("m", caches(hits=5, misses=3, size=20))
    metrics.cached("m", caches(hits=9, misses=3, size=15))
    found = samples(metrics)
    assert found["visprune_picture_cache_hits_total", "m"] == 4
    assert found["visprune_picture_cache_misses_total", "m"] == 2
    assert found["visprune_picture_cache_bytes", "m"] == 15
    assert found["visprune_prefix_cache_hits_total", "m"] == 8
    assert found["visprune_prefix_cache_bytes", "m"] == 30


def test_the_table_of_the_documentation_has_every_metric():
    metrics = Metrics()
    families = parser.text_string_to_metric_families(metrics.render()[0].decode())
    names = {f.name + ("_total" if f.type == "counter" else "") for f in families}
    names = {name for name in names if not name.startswith("visprune_process_")}
    table = module.__doc__.replace("`..._misses_total`", "")
    told = set(re.findall(r"`(visprune_[a-z_]+)`", table))
    told |= {name.replace("hits", "misses") for name in told if "hits" in name}
    assert names == told


def test_two_servers_count_apart():
    one, two = Metrics(), Metrics()
    one.refused("loading")
    assert ("visprune_refusals_total", "loading") not in samples(two)


def test_without_prometheus_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"visprune\[serve\]"):
        Metrics()

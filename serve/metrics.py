"""Figures of the server in the format of Prometheus.

| metric | kind | labels | what it counts |
|---|---|---|---|
| `visprune_queued_requests` | gauge | | requests that wait for a place |
| `visprune_active_requests` | gauge | | requests that are being computed |
| `visprune_conversation_memory_bytes` | gauge | | bytes set aside for the active requests |
| `visprune_picture_cache_bytes` | gauge | model | bytes of cached picture features |
| `visprune_prefix_cache_bytes` | gauge | model | bytes of cached conversations |
| `visprune_queue_seconds` | histogram | model | from a request's arrival to its first computation |
| `visprune_first_token_seconds` | histogram | model | from a request's arrival to its first token |
| `visprune_later_token_seconds` | histogram | model | from a token of an answer to its next one, other requests' turns included |
| `visprune_requests_total` | counter | model, finish | accepted requests by their end: `eos`, `stop`, `length`, or the code of what ended them early, such as `client_gone` or `request_timeout` |
| `visprune_prompt_tokens_total` | counter | model | tokens of prompts, visual ones included |
| `visprune_prompt_tokens_cached_total` | counter | model | those of them that the prefix cache held |
| `visprune_generated_tokens_total` | counter | model | generated tokens |
| `visprune_visual_tokens_kept_total` | counter | model | visual tokens that the language model got |
| `visprune_visual_tokens_dropped_total` | counter | model | visual tokens that were pruned |
| `visprune_picture_cache_hits_total`, `..._misses_total` | counter | model | pictures whose features were cached, and were not |
| `visprune_prefix_cache_hits_total`, `..._misses_total` | counter | model | prompts of which the beginning was cached, and was not |
| `visprune_refusals_total` | counter | code | refused requests by the error's code, such as `queue_full` |
| `visprune_process_...` | gauge, counter | | memory, processor time and open files of the process |

Tokens are counted when an answer ends; those of prompts and pictures, when it is complete. No label holds anything that
a client wrote.
"""  # noqa: E501 - rows of a table

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from visprune.optional import require
from visprune.serve.errors import Refusal

if TYPE_CHECKING:
    from visprune.runtime import Generation
    from visprune.runtime.loaded_model import Caches

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """Figures of one server, in a registry of its own. Every method may be called from any thread.

    The scheduler calls all methods but `refused`. That one is called where a refusal is sent to a client, so
    that each is counted once.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        prometheus = require("prometheus_client", extra="serve")
        self._registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(namespace="visprune", registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Any:
            return prometheus.Gauge(f"visprune_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"visprune_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return prometheus.Histogram(
                f"visprune_{name}", text, ("model",), buckets=buckets, registry=registry
            )

        self._queued = gauge("queued_requests", "Requests that wait for a place.")
        self._active = gauge("active_requests", "Requests that are being computed.")
        self._memory = gauge("conversation_memory_bytes", "Bytes set aside for the active requests.")
        self._queue = histogram(
            "queue_seconds", "From a request's arrival to its first computation.", _SECONDS
        )
        self._first = histogram(
            "first_token_seconds", "From a request's arrival to its first token.", _SECONDS
        )
        self._later = histogram(
            "later_token_seconds", "From a token of an answer to its next one.", _TOKEN_SECONDS
        )
        self._requests = counter("requests", "Accepted requests by their end.", "model", "finish")
        self._refusals = counter("refusals", "Refused requests by the error's code.", "code")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", "model")
        self._cached = counter("prompt_tokens_cached", "Tokens that the prefix cache held.", "model")
        self._generated = counter("generated_tokens", "Generated tokens.", "model")
        self._kept = counter("visual_tokens_kept", "Visual tokens that the model got.", "model")
        self._dropped = counter("visual_tokens_dropped", "Visual tokens that were pruned.", "model")
        self._caches = {
            name: (
                gauge(f"{name}_cache_bytes", f"Bytes of the {name} cache.", "model"),
                counter(f"{name}_cache_hits", f"Lookups that the {name} cache answered.", "model"),
                counter(f"{name}_cache_misses", f"Lookups that the {name} cache did not answer.", "model"),
            )
            for name in ("picture", "prefix")
        }
        self._lookups: dict[tuple[str, str], tuple[int, int]] = {}

    def occupied(self, queued: int, active: int, memory: int) -> None:
        """Say how many requests wait and compute, and the bytes set aside for the latter."""
        self._queued.set(queued)
        self._active.set(active)
        self._memory.set(memory)

    def refused(self, code: str) -> None:
        """Count a refusal that was sent to a client."""
        self._refusals.labels(code).inc()

    def started(self, model: str, seconds: float) -> None:
        """Count a request whose computation begins, after so many seconds."""
        self._queue.labels(model).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """Count the first token of an answer, so many seconds after the request's arrival."""
        self._first.labels(model).observe(seconds)

    def later_token(self, model: str, seconds: float) -> None:
        """Count another token of an answer, so many seconds after the one before."""
        self._later.labels(model).observe(seconds)

    def ended(self, model: str, outcome: Generation | Refusal, generated: int) -> None:
        """Count an accepted request that has ended.

        Args:
            model: Name of the model.
            outcome: The whole answer, or the refusal that ended it.
            generated: Number of tokens generated until then.
        """
        if isinstance(outcome, Refusal):
            self._requests.labels(model, outcome.code).inc()
            self._generated.labels(model).inc(generated)
            return
        self._requests.labels(model, outcome.finish_reason).inc()
        self._generated.labels(model).inc(len(outcome.token_ids))
        self._prompt.labels(model).inc(outcome.tokens_in)
        self._cached.labels(model).inc(outcome.tokens_cached)
        self._kept.labels(model).inc(outcome.tokens_kept)
        self._dropped.labels(model).inc(outcome.visual_tokens - outcome.tokens_kept)

    def cached(self, model: str, caches: Caches) -> None:
        """Take the figures of a pipeline's caches. Lookups before the first call are not counted."""
        for name, cache in (("picture", caches.pictures), ("prefix", caches.prefixes)):
            size, hits, misses = self._caches[name]
            now = (cache.hits, cache.misses)
            before = self._lookups.get((model, name), now)
            self._lookups[model, name] = now
            size.labels(model).set(cache.bytes)
            hits.labels(model).inc(now[0] - before[0])
            misses.labels(model).inc(now[1] - before[1])

    def render(self) -> tuple[bytes, str]:
        """Return the text for Prometheus, and its content type."""
        prometheus = require("prometheus_client", extra="serve")
        return prometheus.generate_latest(self._registry), prometheus.CONTENT_TYPE_LATEST

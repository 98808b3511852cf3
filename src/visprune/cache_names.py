"""Names of the key-value cache in a bundle's program: what each layer reads and writes."""

from __future__ import annotations

from visprune.manifest import Decoder

__all__ = ["PAST", "PRESENT", "past_names", "present_names"]

PAST, PRESENT = "past_key_values.", "present."
"""Prefixes of the values that the cache supplies, and of those that it takes."""


def past_names(decoder: Decoder) -> list[str]:
    """Return the names of the values that the cache supplies: key and value of each layer in turn."""
    return _names(PAST, decoder)


def present_names(decoder: Decoder) -> list[str]:
    """Return the names of the values that the cache takes, in the order of `past_names`."""
    return _names(PRESENT, decoder)


def _names(prefix: str, decoder: Decoder) -> list[str]:
    return [f"{prefix}{layer}.{part}" for layer in range(decoder.num_layers) for part in ("key", "value")]

"""The cache holds what it is given and cuts each layer to a prefix."""

from __future__ import annotations

import numpy as np

from visprune.cache_names import past_names, present_names
from visprune.manifest import Decoder
from visprune.runtime.kv_cache import KVCache

DECODER = Decoder(2, 3, 5, "float16", 10, 100, None, (1,))


def fill(cache, *lengths):
    arrays = [
        np.random.default_rng(i).random((1, 3, length, 5)).astype(np.float16)
        for i, length in enumerate(n for n in lengths for _ in range(2))
    ]
    cache.update(dict(zip(present_names(DECODER), arrays, strict=True)))
    return arrays


def test_starts_empty():
    cache = KVCache(DECODER)
    assert cache.lengths == (0, 0)
    feeds = cache.feeds()
    assert list(feeds) == past_names(DECODER)
    assert {(value.shape, value.dtype.name) for value in feeds.values()} == {((1, 3, 0, 5), "float16")}


def test_hands_back_the_same_values():
    cache = KVCache(DECODER)
    arrays = fill(cache, 7, 7)
    assert all(a is b for a, b in zip(cache.feeds().values(), arrays, strict=True))
    cache.crop([7, 7])
    assert all(a is b for a, b in zip(cache.feeds().values(), arrays, strict=True))


def test_crop_keeps_the_front():
    cache = KVCache(DECODER)
    arrays = fill(cache, 7, 7)
    cache.crop([4, 4])
    assert cache.lengths == (4, 4)
    for value, array in zip(cache.feeds().values(), arrays, strict=True):
        np.testing.assert_array_equal(value, array[:, :, :4])
        assert value.base is None  # the longer buffer is not kept alive
    cache.crop([0, 0])
    assert cache.lengths == (0, 0)


def test_layers_are_cut_to_lengths_of_their_own():
    cache = KVCache(DECODER)
    arrays = fill(cache, 7, 3)
    assert cache.lengths == (7, 3)
    cache.crop([5, 3])
    assert cache.lengths == (5, 3)
    first, second = list(cache.feeds().values())[:2], list(cache.feeds().values())[2:]
    for value, array in zip(first, arrays[:2], strict=True):
        np.testing.assert_array_equal(value, array[:, :, :5])
    assert all(a is b for a, b in zip(second, arrays[2:], strict=True))  # nothing to cut, nothing copied


def test_a_deep_layer_may_become_empty():
    cache = KVCache(DECODER)
    fill(cache, 7, 3)
    cache.crop([2, 0])
    assert cache.lengths == (2, 0)
    assert {value.shape for value in list(cache.feeds().values())[2:]} == {(1, 3, 0, 5)}

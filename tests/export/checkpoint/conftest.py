"""Fixtures of the tests of adapters. Their helper is imported late, because it needs peft."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint(checkpoint.Tiny(lively=True))


@pytest.fixture(scope="module")
def ordinary(base, tmp_path_factory):
    import adapters

    path = tmp_path_factory.mktemp("adapter") / "lora"
    return adapters.make(path, base, r=2, lora_alpha=3, target_modules=list(adapters.LINEAR))


@pytest.fixture
def adapter(ordinary, tmp_path):
    """Make a copy of an ordinary adapter of `base`."""
    return lambda name="lora": shutil.copytree(ordinary, tmp_path / name)

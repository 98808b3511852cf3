"""Refusals of errors of the runtime."""

from __future__ import annotations

import pytest

from visprune.errors import (
    BundleError,
    InputError,
    MemoryShortageError,
    UnsupportedError,
    UsageError,
    VispruneError,
)
from visprune.serve.errors import refusal_of


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (InputError, 400, "invalid_request"),
        (UsageError, 400, "invalid_request"),
        (UnsupportedError, 400, "invalid_request"),
        (MemoryShortageError, 503, "out_of_memory"),
        (BundleError, 500, "model_failed"),
    ],
)
def test_whose_fault_it_is(kind: type[VispruneError], status: int, code: str):
    refusal = refusal_of(kind("This is wrong.", "Do that."), "messages")
    assert (refusal.status, refusal.code, refusal.param) == (status, code, "messages")
    assert (refusal.retry_after is not None) == (status == 503)
    assert refusal.body()["error"]["message"] == "This is wrong. Do that."

"""Engines on a real GPU, where there is one, answer as ONNX Runtime does on the CPU."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from visprune.errors import VispruneError
from visprune.runtime import load
from visprune.runtime.backends.device import Device
from visprune.runtime.backends.runner import to_numpy
from visprune.targets import TARGETS

pytestmark = pytest.mark.gpu

TOLERANCE = 0.1  # error of float16 logits, relative to the largest logit


@pytest.fixture(scope="module")
def sm():
    try:
        return Device().sm
    except VispruneError as error:
        pytest.skip(error.what)


@pytest.fixture(scope="module", params=["tensorrt", "rtx"])
def built(request, sm, tmp_path_factory):
    """The demo model and its engines."""
    target = TARGETS[request.param]
    if importlib.util.find_spec(target.engines) is None or sm not in target.sms:
        pytest.skip(f"no {target.engines} for SM{sm}")
    from visprune.engines import build
    from visprune.export import export

    folder = tmp_path_factory.mktemp("gpu")
    bundle = export(
        method="fopru-rank", ratio=0.5, target=target.name, verify=False, output=folder / "bundle"
    )
    options = {"sm": (sm,)} if target.anywhere else {}
    return build(bundle, folder / "engines", target=target.name, **options), target.engines.replace("_", "-")


def answers(bundle, provider, **options):
    """Chat in two turns, and return the tokens, and the logits of a prompt of three tokens."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    with load(bundle.path, provider=provider, **options) as pipeline:
        chat = pipeline.chat()
        said = [chat.generate("What is it?", [picture]).token_ids, chat.generate("Why?").token_ids]
        other = pipeline.chat()._session
        return said, np.ravel(to_numpy(other.prefill([5, 6, 7], []).logits)).astype(np.float32)


@pytest.mark.parametrize("low_memory", [False, True])
def test_engines_answer_as_the_cpu_does(built, low_memory):
    bundle, provider = built
    wanted, found = answers(bundle, "cpu"), answers(bundle, provider, low_memory=low_memory)
    assert found[0] == wanted[0]
    assert np.abs(found[1] - wanted[1]).max() < TOLERANCE * np.abs(wanted[1]).max()

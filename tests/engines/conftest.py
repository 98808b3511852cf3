"""The demo model for RTX GPUs, exported once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def rtx(tmp_path_factory):
    pytest.importorskip("torch")
    from visprune.export import export

    output = tmp_path_factory.mktemp("rtx") / "demo"
    return export(method="fopru-rank", ratio=0.5, target="rtx", verify=False, output=output)


@pytest.fixture
def rtx_copy(rtx, tmp_path):
    """Copy that bundle with other fields of its manifest: `rtx_copy(field=value) -> Bundle`."""
    import shutil
    from dataclasses import replace

    from visprune.bundle import Bundle
    from visprune.manifest import MANIFEST

    def make(**changes):
        folder = tmp_path / "changed"
        shutil.copytree(rtx.path, folder)
        (folder / MANIFEST).write_text(replace(rtx.manifest, **changes).to_json(), encoding="utf-8")
        return Bundle.open(folder)

    return make

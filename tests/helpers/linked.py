"""Bundles as they come from elsewhere: as the hub's cache holds them, and as hard-linked copies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from visprune.records import sha256

__all__ = ["WAYS", "hard_linked", "in_hub_cache"]


def in_hub_cache(source: Path, cache: Path) -> Path:
    """A copy whose every file is a relative link to a blob named by its hash; gives the snapshot's folder."""
    entry = cache / "models--me--llava"
    snapshot = entry / "snapshots" / "0123abcd"
    (entry / "blobs").mkdir(parents=True)
    for file in [path for path in source.rglob("*") if path.is_file()]:
        blob, link = entry / "blobs" / sha256(file), snapshot / file.relative_to(source)
        shutil.copyfile(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def hard_linked(source: Path, folder: Path) -> Path:
    """What `cp -al` makes, of a copy: the source's own files keep one name."""
    shutil.copytree(source, folder / "first")
    shutil.copytree(folder / "first", folder / "second", copy_function=os.link)
    return folder / "second"


WAYS = {"in the hub's cache": in_hub_cache, "hard-linked": hard_linked}

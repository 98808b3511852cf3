"""Bundles: directories whose manifest is the only contract between the commands.

Opening a bundle checks that its manifest makes sense, and that the files it names exist, have their size, and
lie inside the bundle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath

from visprune.errors import BundleError, UsageError
from visprune.manifest import MANIFEST, SCHEMA_VERSION, SUPPLIED, Manifest
from visprune.records import from_json, sha256

__all__ = ["Bundle"]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk. `open` reads and checks the manifest; `verify` hashes the files."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read a bundle's manifest, and check that the files it names exist and lie inside the bundle.

        Sizes of files are compared, contents are not: see `verify`.

        Raises:
            BundleError: The directory is no bundle, the manifest cannot be read or is newer than this
                version, a path leads out of the bundle, or a file is missing or truncated.
        """
        root = Path(path)
        file = root / MANIFEST
        try:
            if not file.is_file():
                if file.is_symlink():
                    raise BundleError(
                        f"{file} is a link to a file that is missing.", "Copy the bundle with cp -rL."
                    )
                raise BundleError(
                    f"{root} is not a bundle: it has no {MANIFEST}.",
                    "Give a directory that `visprune export` wrote.",
                )
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{file} cannot be read: {error}.", "Export the model again.") from None
        version = data.get("schema_version") if isinstance(data, dict) else None
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise BundleError(f"{file} has no schema version.", "Export the model again.")
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{file} has schema {version}, and this visprune reads up to {SCHEMA_VERSION}.",
                "Update it with: pip install -U visprune.",
            )
        bundle = cls(root, _as_of_today(from_json(Manifest, data, MANIFEST)))
        bundle._check_program()
        bundle._check_pruning()
        bundle._check_files()
        return bundle

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest names.

        The name must stay inside the bundle, and so must the file that it links to. There is one exception:
        in a snapshot of the Hugging Face hub's cache, where every file is a link, the `blobs` of the same
        cache entry count as inside. Any other link that leads out is refused, because a copy of the bundle
        would contain a file that is no part of it.

        Raises:
            BundleError: The name is absolute or climbs out of the bundle, or a link leads out of it.
        """
        pure = PurePosixPath(name)
        path = self.path / pure
        named = inside = not pure.is_absolute() and ".." not in pure.parts and "\\" not in name and name != ""
        try:
            inside = inside and any(map(path.resolve().is_relative_to, self._places()))
        except (OSError, RuntimeError, ValueError):  # a loop of links, or a NUL in the name
            named, inside = named and "\0" not in name, False
        if named and not inside:
            raise BundleError(
                f"{MANIFEST} names {name!r}, which lies outside the bundle: a link leads elsewhere.",
                "Put the file itself there (cp -rL copies a bundle so), or get it from a source you trust.",
            )
        if not inside:
            raise BundleError(
                f"{MANIFEST} names {name!r}, which lies outside the bundle.",
                "Do not use this bundle; get it again from a source you trust.",
            )
        return path

    def _places(self) -> Iterator[Path]:
        """Yield the directories that its files may lie in after links are resolved."""
        root = self.path.resolve()
        yield root
        # A cache entry is models--OWNER--NAME/snapshots/COMMIT/..., with its `blobs` next to `snapshots`. The
        # path of `blobs` is not resolved: if it were a link, it could lead anywhere.
        yield from (folder.parent / "blobs" for folder in root.parents if folder.name == "snapshots")

    def _check_program(self) -> None:
        """Check that each stage names a known graph and its tensors, and that values are assigned once."""
        inside = self.manifest.layer_pruning
        assigned = {*SUPPLIED, *(inside.supplied() if inside else ())}
        for stage in self.manifest.stages:
            graph = self.manifest.graphs.get(stage.graph)
            if graph is None:
                raise BundleError(
                    f"{MANIFEST} has a stage for the unknown graph {stage.graph!r}.", "Export again."
                )
            names = ({t.name for t in graph.inputs}, {t.name for t in graph.outputs})
            if set(stage.inputs) != names[0] or not set(stage.outputs) <= names[1]:
                raise BundleError(
                    f"The stage {stage.graph!r} does not fit its graph's tensors.", "Export again."
                )
            steady = any(
                value == "logits" or value.startswith("present.") for value in stage.outputs.values()
            )
            if steady and stage.when != "always":
                raise BundleError(f"The stage {stage.graph!r} would not run at every token.", "Export again.")
            for value in stage.outputs.values():
                if value in assigned or value.startswith("past_key_values."):
                    raise BundleError(f"{MANIFEST} assigns {value!r} twice.", "Export again.")
                assigned.add(value)
            outputs, inputs = set(stage.outputs.values()), set(stage.inputs.values())
            if not set(stage.bypass) <= outputs or not set(stage.bypass.values()) <= inputs:
                raise BundleError(
                    f"The stage {stage.graph!r} is bypassed by values that are not its own.", "Export again."
                )

    def _check_pruning(self) -> None:
        pruning = self.manifest.pruning
        try:
            pruning.budget.from_tokens(pruning.keep_tokens)
        except UsageError as error:
            raise BundleError(f"{MANIFEST} cannot be used: {error.what}", "Export again.") from None
        self._check_traits()
        if not 0 <= pruning.always_kept <= pruning.budget.visual_tokens:
            raise BundleError(f"{MANIFEST} always keeps {pruning.always_kept} tokens.", "Export again.")
        shapes, decoder = self.manifest.shapes, self.manifest.decoder
        if shapes is not None and shapes.num_layers != decoder.num_layers:
            raise BundleError(
                f"{MANIFEST} has shapes of {shapes.num_layers} layers for a decoder of {decoder.num_layers}.",
                "Export again.",
            )
        inside = self.manifest.layer_pruning
        if inside is not None and inside.layers[-1] >= self.manifest.decoder.num_layers - 1:
            raise BundleError(
                f"{MANIFEST} prunes after layer {inside.layers[-1]} of {self.manifest.decoder.num_layers}, "
                "where nothing follows.",
                "Export again.",
            )
        if pruning.grid is None:
            return
        rows, columns = pruning.grid
        tokens = pruning.budget.visual_tokens
        # The patches before `grid_offset` have no visual token.
        if (
            min(rows, columns) < 1
            or pruning.grid_offset < 0
            or rows * columns != tokens + pruning.grid_offset
        ):
            raise BundleError(
                f"{MANIFEST} has {tokens} visual tokens from patch {pruning.grid_offset} on, "
                f"which are not the rest of a grid of {rows} x {columns}.",
                "Export again.",
            )

    def _check_traits(self) -> None:
        """Check that what the manifest says of the method before the LLM fits its program and its budget."""
        pruning, stages = self.manifest.pruning, self.manifest.stages
        read = {value for stage in stages for value in stage.inputs.values()}
        assigned = {value for stage in stages for value in stage.outputs.values()}
        resizing, shrinks = pruning.resizing, pruning.budget.unit == "square"
        tokens = pruning.budget.visual_tokens
        facts = {
            "needs_text": pruning.needs_text == ("question_ids" in read),
            "merges": pruning.merges == ("merge_weights" in assigned),
            "budget": not shrinks or pruning.merges or pruning.resizes,
            "resizing": resizing is None
            or (shrinks and (resizing.image_size // resizing.patch_size) ** 2 == tokens),
        }
        wrong = next((name for name, holds in facts.items() if not holds), None)
        if wrong is not None:
            raise BundleError(
                f"{MANIFEST} has a {wrong} of {pruning.method} that does not fit the rest of the bundle.",
                "Copy the bundle again, or export again.",
            )

    def _check_files(self) -> None:
        manifest = self.manifest
        named = [manifest.text.tokenizer, manifest.image_processor]
        named += [name for name in (manifest.text.chat_template, manifest.video_processor) if name]
        named += [manifest.quantization.report] if manifest.quantization else []
        for engine in manifest.engines:
            if engine.graph not in manifest.graphs:
                raise BundleError(
                    f"{MANIFEST} has an engine of the unknown graph {engine.graph!r}.", "Build again."
                )
            named.append(engine.file)
        for graph in manifest.graphs.values():
            named += [graph.file, *([graph.data] if graph.data else [])]
        for name in dict.fromkeys([*named, *manifest.files]):
            path = self.file(name)
            record = manifest.files.get(name)
            if record is None:
                raise BundleError(f"{MANIFEST} has no hash for {name}.", "Export the model again.")
            try:
                size = path.stat().st_size if path.is_file() else -1
            except OSError:
                size = -1
            if size < 0:
                raise BundleError(
                    f"The bundle's file {name} is missing.", "Copy the bundle again, or export again."
                )
            if size != record.size:
                raise BundleError(
                    f"The bundle's file {name} has {size} bytes instead of {record.size}.",
                    "Copy the bundle again, or export again.",
                )

    def verify(self, names: list[str] | None = None) -> None:
        """Hash files and compare the hashes with the manifest.

        Args:
            names: The files to hash; all of them if None.

        Raises:
            BundleError: A file was altered.
        """
        for name in self.manifest.files if names is None else names:
            if sha256(self.file(name)) != self.manifest.files[name].sha256:
                raise BundleError(
                    f"The bundle's file {name} was altered: its SHA-256 is not the manifest's.",
                    "Copy the bundle again, or export again.",
                )

    def copy(self, names: Iterable[str], folder: Path) -> None:
        """Copy files of the bundle to another bundle's directory, under the same names.

        They are copies and not hard links, because onnx refuses external data with more than one hard link.
        """
        for name in names:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.file(name), place)


def _as_of_today(manifest: Manifest) -> Manifest:
    """Convert an older manifest to the current schema.

    Before schema 3, the stages that see images took all new images at once. They work one by one as well.
    """
    if manifest.schema_version >= 3:
        return manifest
    stages = manifest.stages
    first = len(list(takewhile(lambda stage: stage.when == "visual", stages)))
    images = tuple(replace(stage, when="image") for stage in stages[:first])
    return replace(manifest, stages=images + stages[first:])

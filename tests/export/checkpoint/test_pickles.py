"""Weights in pickles: the values of the safetensors file, read in place, and nothing of a file ever runs."""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from visprune.errors import CheckpointError, UnsupportedError, VispruneError
from visprune.export import export
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.checkpoint.find import find
from visprune.export.checkpoint.weights import _read
from visprune.export.files.pickles import read_pickle
from visprune.export.graph import weightless

PICKLED = CheckpointOptions(pickled_weights=True)


@pytest.fixture
def copy(checkpoint, tmp_path):
    return lambda **changes: Path(shutil.copytree(checkpoint(checkpoint.Tiny(**changes)), tmp_path / "model"))


def pickled(path, shards=1):
    """The checkpoint with its weights in pickles alone."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, path / "pytorch_model.bin")
        return path
    places = {}
    for index in range(shards):
        file = f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in sorted(tensors)[index::shards]}
        torch.save(part, path / file)
        places |= dict.fromkeys(part, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def saved(tmp_path, content, **options):
    torch.save(content, tmp_path / "x.bin", **options)
    return tmp_path / "x.bin"


def values(file):
    """What is read from the file, by name."""
    return {name: _read(place) for name, place in read_pickle(file).items()}


def refused(match, file, kind=VispruneError):
    with pytest.raises(kind, match=match) as caught:
        read_pickle(file)
    assert caught.value.hint.endswith(".")
    return caught.value


class TestCheckpoints:
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_the_weights_of_the_safetensors(self, dtype, shards, checkpoint, copy):
        original = checkpoint(checkpoint.Tiny(dtype=dtype, tied=shards == 3))
        path = pickled(copy(dtype=dtype, tied=shards == 3), shards)
        want = weightless.load_model(find(original)).state_dict()
        got = weightless.load_model(find(path, PICKLED)).state_dict()
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype == getattr(torch, dtype), name
            assert torch.equal(got[name], tensor), name

    def test_an_export(self, copy, tmp_path):
        bundle = export(pickled(copy(), 2), method="none", output=tmp_path / "out", pickled_weights=True)
        assert bundle.manifest.parity.verified
        assert bundle.manifest.source.weights_sha256

    def test_only_if_allowed_and_if_there_are_no_safetensors(self, checkpoint, copy):
        path = pickled(copy())
        with pytest.raises(CheckpointError, match=r"pickles \(pytorch_model\.bin\)") as caught:
            find(path)
        assert "--pickled-weights" in caught.value.hint
        assert find(path, PICKLED).weights == (path / "pytorch_model.bin",)
        (path / "pytorch_model.bin").write_bytes(b"nonsense")
        shutil.copy(checkpoint(checkpoint.Tiny()) / "model.safetensors", path)
        assert find(path, PICKLED).weights == (path / "model.safetensors",)

    def test_a_download_without_the_shards_names_the_option(self, copy):
        """Pickles are not downloaded unless they are asked for, and their index is."""
        path = pickled(copy(), 2)
        for file in path.glob("*.bin"):
            file.unlink()
        with pytest.raises(CheckpointError, match=r"pickles \(pytorch_model\.bin\.index\.json\)") as caught:
            find(path)
        assert "--pickled-weights" in caught.value.hint

    def test_files_that_are_no_weights(self, copy):
        path = copy()
        (path / "model.safetensors").unlink()
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "optimizer.bin"):
            torch.save({"model.x.weight": torch.ones(2)}, path / name)
        for options in (CheckpointOptions(), PICKLED):
            with pytest.raises(CheckpointError, match="has no weights"):
                find(path, options)
        torch.save({"model.x.weight": torch.ones(2)}, path / "mm_projector.bin")
        with pytest.raises(CheckpointError, match=r"no pytorch_model\.bin, .* named mm_projector\.bin"):
            find(path, PICKLED)

    def test_an_index_of_safetensors_that_names_a_pickle(self, copy):
        path = pickled(copy())
        index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        for options in (CheckpointOptions(), PICKLED):
            with pytest.raises(CheckpointError, match=r"of another kind than \.safetensors"):
                find(path, options)

    def test_shards_without_an_index_and_an_index_without_shards(self, copy):
        path = pickled(copy(), 2)
        (path / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
            find(path, PICKLED)
        (path / "pytorch_model.bin.index.json").unlink()
        with pytest.raises(CheckpointError, match=r"no pytorch_model\.bin\.index\.json"):
            find(path, PICKLED)

    def test_numbers_that_are_none(self, copy):
        path = copy()
        tensors = load_file(path / "model.safetensors")
        tensors[min(name for name in tensors if "up_proj" in name)][0, 0] = float("nan")
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds NaN"):
            weightless.load_model(find(pickled(path), PICKLED))

    def test_a_file_that_became_shorter(self, copy):
        path = pickled(copy())
        model, weights = weightless.open_model(find(path, PICKLED))
        file = path / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(CheckpointError, match="became shorter"):
            weights.fill(model)


class TestTensors:
    def test_views_of_every_kind(self, tmp_path):
        base = torch.randn(6, 8)
        content = {
            "whole": base,
            "rows": base[2:4],
            "block": base[1:5, 3:6],
            "steps": base[::2, 1::3],
            "transposed": base.t(),
            "permuted": torch.randn(2, 3, 4).permute(2, 0, 1)[1:],
            "repeated": torch.randn(3, 1).expand(3, 5),
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 4),
            "one": torch.randn(1, 5).t(),
            "half": torch.randn(3).half(),
            "brain": torch.nn.Parameter(torch.randn(3, 2).bfloat16()),
            "double": torch.randn(3).double(),
            "long": torch.arange(5)[1:3],
            "int": torch.arange(5, dtype=torch.int32),
            "bool": torch.tensor([True, False]),
        }
        got = values(saved(tmp_path, content))
        assert list(got) == list(content)
        for name, tensor in content.items():
            assert got[name].dtype == tensor.dtype, name
            assert got[name].is_contiguous(), name
            assert torch.equal(got[name], tensor), name

    def test_tensors_that_share_their_values_are_stored_once(self, tmp_path):
        base = torch.randn(4, 4)
        places = read_pickle(saved(tmp_path, {"a": base, "b": base, "c": torch.randn(4, 4)}))
        assert places["a"].offset == places["b"].offset != places["c"].offset

    def test_dictionaries_around_them(self, tmp_path):
        state = collections.OrderedDict(a=torch.randn(2), b=torch.randn(3))
        optimizer = {"state": {0: {"exp_avg": torch.randn(2)}}, "param_groups": [{"lr": 0.1}]}
        for content in (
            state,
            {"state_dict": state, "epoch": 3, "optimizer_states": [optimizer], "version": "2.1"},
            {"model": dict(state), "optimizer": optimizer},
            dict(state) | {"epoch": 3, "loss": 0.5, "name": "x", "best": None, "done": True},
            torch.nn.Linear(3, 2).state_dict(),
        ):
            inner = content.get("state_dict", content.get("model", content))
            want = {name: tensor for name, tensor in inner.items() if isinstance(tensor, torch.Tensor)}
            got = values(saved(tmp_path, content))
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)

    def test_nothing_is_read_until_it_is_needed(self, tmp_path):
        """A file of 8 GB of zeros, as a sparse file that takes no space on disk."""
        name, size = "x/data/0", 8 << 30
        saved(tmp_path, {"w.weight": torch.ones(4, 4)})
        with zipfile.ZipFile(tmp_path / "x.bin") as archive:
            pickled = archive.read("x/data.pkl")
        numbers = b"K\x10tq"  # 16, the number of elements, and what follows it
        assert pickled.count(numbers) == 1
        shape = b"K\x04K\x04\x86"
        assert pickled.count(shape) == 1
        large = (1 << 31).to_bytes(5, "little")
        pickled = pickled.replace(numbers, b"\x8a\x05" + large + b"tq")
        pickled = pickled.replace(shape, b"\x4a" + (1 << 29).to_bytes(4, "little") + b"K\x04\x86")
        with zipfile.ZipFile(tmp_path / "large.bin", "w") as archive:
            archive.writestr("x/data.pkl", pickled)
            archive.writestr("x/byteorder", b"little")
            archive.writestr("x/version", b"3\n")
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
                start = archive.fp.tell()
                archive.fp.seek(start + size)  # a hole
                entry._file_size = entry._compress_size = size
        place = read_pickle(tmp_path / "large.bin")["w.weight"]
        assert (place.offset, place.length, place.shape) == (start, size, (1 << 29, 4))
        assert (tmp_path / "large.bin").stat().st_blocks * 512 < 1 << 20


class Creates:
    """An object whose unpickling would create a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


class TestRefused:
    def test_code_does_not_run(self, tmp_path):
        mark = tmp_path / "mark"
        for content in ({"a": torch.ones(2), "b": Creates(mark)}, Creates(mark)):
            error = refused("would load io.open", saved(tmp_path, content), UnsupportedError)
            assert "more than tensors" in error.what
            (tmp_path / "x.bin").write_bytes(pickle.dumps(content, 2))
            refused("plain pickle", tmp_path / "x.bin", UnsupportedError)
            assert not mark.exists()
        pickle.loads((tmp_path / "x.bin").read_bytes())
        assert mark.exists()  # the object does what the test says

    def test_objects(self, tmp_path):
        file = saved(tmp_path, {"args": argparse.Namespace(lr=1), "w": torch.ones(2), "at": Path("x")})
        refused(r"would load argparse\.Namespace, pathlib\.", file, UnsupportedError)
        refused(r"would load torch\.nn\.modules\.", saved(tmp_path, torch.nn.Linear(2, 2)), UnsupportedError)

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ({"a": torch.ones(2), "b": [1, 2]}, "holds 'b', a list and not a tensor"),
            ({"a": torch.ones(2), "b": {"c": torch.ones(2)}}, "holds 'b', a dict"),
            ({"a": torch.ones(2), 3: torch.ones(2)}, "a tensor named 3"),
            ({"model": {"a": torch.ones(2)}, "ema": {"a": torch.ones(2)}}, "several .* 'model' and 'ema'"),
            ({"epoch": 3}, "no dictionary of tensors"),
            ([torch.ones(2)], "no dictionary of tensors"),
            (torch.ones(2), "no dictionary of tensors"),
            ({"a": torch.eye(3).to_sparse()}, "cannot be read as plain tensors"),
            ({"a": torch.ones(2, device="meta")}, "not stored as plain values"),
            ({"a": torch.ones(2, dtype=torch.complex64)}, "is of type complex64"),
            ({"a": torch.ones(2, dtype=torch.uint8)}, "is of type uint8"),
            ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "is of type float8_e4m3fn"),
            ({"a.weight": torch.arange(3)}, "is of type I64, which is not a floating-point type"),
        ],
    )
    def test_no_plain_tensors(self, content, match, tmp_path):
        refused(match, saved(tmp_path, content), UnsupportedError)

    def test_old_formats(self, tmp_path):
        file = saved(tmp_path, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
        assert "torch" in refused("before version 1.6", file, UnsupportedError).hint
        with tarfile.open(file, "w") as archive:
            archive.add(__file__)
        refused("before version 1.6", file, UnsupportedError)

    def test_damaged_files(self, tmp_path):
        file = saved(tmp_path, {"a": torch.randn(100, 100)})
        whole = file.read_bytes()
        for part in (whole[:-20], whole[: len(whole) // 2], whole[:4]):
            file.write_bytes(part)
            refused("is truncated", file, CheckpointError)
        file.write_bytes(whole[:10_000] + whole[14_000:])
        refused("is truncated", file, CheckpointError)
        for content in (b"", b"<html>not found</html>", b"\0" * 600):
            file.write_bytes(content)
            refused("not a file of torch.save", file, CheckpointError)
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        refused("pointer of Git LFS", file, CheckpointError)

    def test_files_that_were_packed_again(self, tmp_path):
        file, again = saved(tmp_path, {"a": torch.randn(3), "b": torch.randn(3)}), tmp_path / "again.bin"
        for compression, match in (
            (zipfile.ZIP_DEFLATED, "is compressed"),
            (zipfile.ZIP_STORED, "where torch"),
        ):
            with zipfile.ZipFile(file) as old, zipfile.ZipFile(again, "w", compression) as new:
                for entry in reversed(old.infolist()):
                    new.writestr(entry.filename, old.read(entry))
            refused(match, again)

    def test_a_tensor_beyond_its_bytes(self, tmp_path):
        file = saved(tmp_path, {"a": torch.ones(4, 4)})
        whole = file.read_bytes()
        numbers, shape = b"K\x10tq", b"K\x04K\x04\x86"
        file.write_bytes(whole.replace(numbers, b"K\x40tq").replace(shape, b"K\x08K\x08\x86"))
        refused("where torch.save puts it|truncated", file)

    def test_bytes_in_the_other_order(self, tmp_path):
        file = saved(tmp_path, {"a": torch.ones(4)})
        again = tmp_path / "again.bin"
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(again, "w") as new:
            for entry in old.infolist():
                new.writestr(entry, b"big" if entry.filename.endswith("byteorder") else old.read(entry))
        refused("big-endian", again, UnsupportedError)

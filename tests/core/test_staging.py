"""A directory whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from visprune.errors import ExportError, UsageError
from visprune.staging import check_destination, staged

MARKER = "visprune.json"


def tree(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): path.read_text() if path.is_file() else "/"
        for path in root.rglob("*")
    }


def write_bundle(folder: Path, content: str) -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "graph").write_text(content)
    (folder / MARKER).write_text(content)


# --- staged ---


@pytest.mark.parametrize("name", ["out", "a/b/out", "x" * 255])
def test_success_leaves_the_directory_and_nothing_else(tmp_path, name):
    with staged(tmp_path / name) as folder:
        assert not (tmp_path / name).exists()
        assert list(folder.iterdir()) == []
        write_bundle(folder, "new")
    assert (tmp_path / name / "onnx" / "graph").read_text() == "new"
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_a_relative_destination_is_taken_from_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged(Path("out")) as folder:
        monkeypatch.chdir("/")
        write_bundle(folder, "new")
    assert (tmp_path / "out" / MARKER).is_file()


def test_the_result_has_the_permissions_of_any_new_directory(tmp_path):
    (tmp_path / "plain").mkdir()
    with staged(tmp_path / "out") as folder:
        write_bundle(folder, "new")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), OSError(errno.EACCES, "x"), KeyboardInterrupt(), SystemExit(1)]
)
@pytest.mark.parametrize("name", ["out", "a/b/out"])
def test_failure_leaves_nothing_not_even_parents(tmp_path, name, error):
    with pytest.raises(type(error)), staged(tmp_path / name) as folder:
        write_bundle(folder, "half")
        raise error
    assert tree(tmp_path) == {}


def test_failure_leaves_parents_that_were_there_or_hold_something_else(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), staged(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "mine").write_text("mine")
        raise RuntimeError
    assert tree(tmp_path) == {"a": "/", "a/b": "/", "a/b/mine": "mine"}
    with pytest.raises(RuntimeError), staged(tmp_path / "a" / "c" / "out"):
        raise RuntimeError
    assert set(tree(tmp_path)) == {"a", "a/b", "a/b/mine"}


def test_an_earlier_result_is_swapped_for_the_new_one(tmp_path):
    for content in ("old", "new"):
        with staged(tmp_path / "out") as folder:
            write_bundle(folder, content)
            if content == "new":
                assert (tmp_path / "out" / MARKER).read_text() == "old"
    assert tree(tmp_path) == {"out": "/", "out/onnx": "/", "out/onnx/graph": "new", f"out/{MARKER}": "new"}


def test_an_earlier_result_survives_a_failure(tmp_path):
    with staged(tmp_path / "out") as folder:
        write_bundle(folder, "old")
    before = tree(tmp_path)
    with pytest.raises(RuntimeError), staged(tmp_path / "out") as folder:
        write_bundle(folder, "half")
        raise RuntimeError
    assert tree(tmp_path) == before


def test_an_earlier_result_comes_back_if_the_swap_fails(tmp_path, monkeypatch):
    with staged(tmp_path / "out") as folder:
        write_bundle(folder, "old")
    before = tree(tmp_path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if "partial" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with pytest.raises(OSError, match="Input/output"), staged(tmp_path / "out") as folder:
        write_bundle(folder, "new")
        monkeypatch.setattr(Path, "rename", failing)
    assert tree(tmp_path) == before


def test_a_directory_that_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(ExportError, match="has appeared meanwhile"), staged(tmp_path / "out") as folder:
        write_bundle(folder, "new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
    assert tree(tmp_path) == {"out": "/", "out/mine": "mine"}


def test_a_link_is_replaced_and_what_it_points_to_is_kept(tmp_path):
    with staged(tmp_path / "real") as folder:
        write_bundle(folder, "old")
    (tmp_path / "out").symlink_to("real")
    with staged(tmp_path / "out") as folder:
        write_bundle(folder, "new")
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out" / MARKER).read_text() == "new"
    assert (tmp_path / "real" / MARKER).read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"out", "real"}


def test_what_a_killed_run_left_behind_is_no_obstacle(tmp_path):
    """Process numbers come again soon in a container."""
    script = f"""
        import os
        from pathlib import Path
        from visprune.staging import staged
        with staged(Path({str(tmp_path)!r}) / "out") as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".visprune-partial-")
    with staged(tmp_path / "out") as folder:
        write_bundle(folder, "new")
    assert (tmp_path / "out" / MARKER).read_text() == "new"


def test_two_writers_do_not_share_a_stage(tmp_path):
    with staged(tmp_path / "one") as first, staged(tmp_path / "two") as second:
        assert first != second
        write_bundle(first, "1")
        write_bundle(second, "2")
    assert (tmp_path / "one" / MARKER).read_text() == "1"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_in_a_sentence(tmp_path, code):
    with pytest.raises(ExportError, match="The disk is full") as caught, staged(tmp_path / "out") as folder:
        write_bundle(folder, "half")
        raise OSError(code, os.strerror(code))
    assert "-o" in caught.value.hint
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "write", ["path.write_bytes(bytes(8192))", "import numpy; numpy.zeros(8192, numpy.uint8).tofile(path)"]
)
def test_a_real_limit_while_writing(tmp_path, write):
    """The operating system refuses the fifth kilobyte: the closest to a full disk without one."""
    script = f"""
        import resource, signal
        from pathlib import Path
        from visprune.errors import ExportError
        from visprune.staging import staged
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with staged(Path({str(tmp_path)!r}) / "new" / "out") as folder:
                (folder / "small").write_bytes(bytes(1024))
                path = folder / "large"
                {write}
        except ExportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert "The disk is full" in done.stdout
    assert tree(tmp_path) == {}


# --- check_destination ---


def test_a_free_place_is_accepted_and_left_as_it_is(tmp_path):
    check_destination(tmp_path / "a" / "b" / "out", force=False, marker=MARKER)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.mkdir(),
        lambda p: p.write_text("x"),
        lambda p: p.symlink_to("nowhere"),
        os.mkfifo,
    ],
    ids=["directory", "file", "dangling link", "pipe"],
)
def test_a_place_that_is_taken_is_refused_even_with_force(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(UsageError, match="exists") as caught:
        check_destination(tmp_path / "out", force=False, marker=MARKER)
    assert "--force" in caught.value.hint
    with pytest.raises(UsageError, match="is not a bundle, so --force will not replace it"):
        check_destination(tmp_path / "out", force=True, marker=MARKER)


def test_force_replaces_an_earlier_bundle_only(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday.jpg").write_text("x")
    with pytest.raises(UsageError, match="not a bundle"):
        check_destination(tmp_path / "out", force=True, marker=MARKER)
    (tmp_path / "out" / MARKER).write_text("{}")
    check_destination(tmp_path / "out", force=True, marker=MARKER)
    with pytest.raises(UsageError, match="exists"):
        check_destination(tmp_path / "out", force=False, marker=MARKER)


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file cannot be written to"):
        check_destination(tmp_path / "file" / "out", force=False, marker=MARKER)


def test_a_parent_without_permission_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="locked cannot be written to"):
        check_destination(tmp_path / "locked" / "out", force=False, marker=MARKER)


def test_a_name_that_no_system_takes_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be made: File name too long"):
        check_destination(tmp_path / ("x" * 256), force=False, marker=MARKER)


def test_a_parent_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UsageError, match="cannot be made"), staged(tmp_path / "dangling" / "out"):
        pytest.fail("the block must not run")
    assert [p.name for p in tmp_path.iterdir()] == ["dangling"]

"""A directory is written whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from visprune.errors import ExportError, UsageError
from visprune.staging import check_destination, staged, tidy, whole

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
    """The operating system refuses the fifth kilobyte, which is close to a full disk."""
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


# --- directories that killed processes leave ---


def process(body: str, folder: Path) -> subprocess.Popen[str]:
    """A process that works beside `folder / "out"`."""
    script = f"""
        import os, shutil, sys
        from pathlib import Path
        from visprune.staging import staged
        folder = Path({str(folder)!r})
        def die(*_):
            os.kill(os.getpid(), 9)
    """
    text = textwrap.dedent(script) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def killed(body: str, folder: Path) -> None:
    with process(body, folder) as run:
        assert run.wait() == -9


HALF = """
    with staged(folder / "out") as stage:
        (stage / "half").write_text("half")
        die()
"""
# A process that is killed at its n-th rename or removal while it replaces an earlier result.
SWAP = """
    count = 0
    def counted(function):
        def call(*args, **kwargs):
            global count
            count += 1
            if count == {n}:
                die()
            return function(*args, **kwargs)
        return call
    Path.rename, shutil.rmtree = counted(Path.rename), counted(shutil.rmtree)
    with staged(folder / "out") as stage:
        (stage / {marker!r}).write_text("new")
"""


def test_a_killed_run_is_no_obstacle_and_is_cleared(tmp_path):
    killed(HALF, tmp_path)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".visprune-partial-")
    with staged(tmp_path / "out") as folder:
        write_bundle(folder, "new")
    assert left.exists()
    assert tidy(tmp_path) == [f"Removed {left.name}, left by an export that did not finish."]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tidy(tmp_path) == []


@pytest.mark.parametrize(("n", "content"), [(1, "old"), (2, "old"), (3, "new"), (4, "new")])
def test_a_run_killed_in_a_swap_loses_nothing(n, content, tmp_path):
    with staged(tmp_path / "out") as folder:
        write_bundle(folder, "old")
    killed(SWAP.format(n=n, marker=MARKER), tmp_path)
    assert (tmp_path / "out").exists() == (n != 2)  # between the two renames there is none
    said = tidy(tmp_path)
    assert ([s for s in said if "back" in s] != []) == (n == 2)
    assert said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / MARKER).read_text() == content


def test_an_earlier_link_comes_back_as_a_link(tmp_path):
    with staged(tmp_path / "real") as folder:
        write_bundle(folder, "old")
    (tmp_path / "out").symlink_to("real")
    killed(SWAP.format(n=2, marker=MARKER), tmp_path)
    tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "real"}
    assert (tmp_path / "out").readlink() == Path("real")


def test_what_a_living_process_uses_is_left_alone(tmp_path):
    body = """
        with staged(folder / "out") as stage:
            (stage / "half").write_text("half")
            print(stage.name, flush=True)
            sys.stdin.read()
    """
    with process(body, tmp_path) as run:
        assert run.stdout is not None
        name = run.stdout.readline().strip()
        assert tidy(tmp_path) == []
        assert (tmp_path / name / "half").exists()
        run.kill()
    assert len(tidy(tmp_path)) == 1
    with staged(tmp_path / "out") as mine:  # nor what this process itself writes
        assert tidy(tmp_path) == []
        assert mine.exists()


def test_one_that_is_tidied_away_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    flock, early = fcntl.flock, []

    def late(descriptor, operation):
        if operation == fcntl.LOCK_EX and not early:
            early.append("now")
            early.extend(tidy(tmp_path))
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", late)
    with staged(tmp_path / "out") as folder:
        write_bundle(folder, "new")
    assert len(early) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_directories_of_ours_are_cleared(tmp_path):
    names = [".visprune-partial-notes", ".visprune-partial-0123456789", ".visprune-old-01234567"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".visprune-partial-01234567").write_text("a file")
    (tmp_path / "mine").mkdir()
    (tmp_path / ".visprune-partial-89abcdef").symlink_to("mine")
    before = tree(tmp_path)
    assert tidy(tmp_path) == []
    assert tree(tmp_path) == before
    assert tidy(tmp_path / "not there") == []


def test_without_locks_nothing_is_cleared_and_the_user_is_told(tmp_path, monkeypatch):
    killed(HALF, tmp_path)
    (left,) = tmp_path.iterdir()

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    (sentence,) = tidy(tmp_path)
    assert str(left) in sentence
    assert left.exists()
    with staged(tmp_path / "out") as folder:
        write_bundle(folder, "new")
    assert (tmp_path / "out" / MARKER).is_file()


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
    for force in (False, True):
        with pytest.raises(UsageError, match="exists and is not a bundle") as caught:
            check_destination(tmp_path / "out", force=force, marker=MARKER)
        assert "--force" not in caught.value.hint


def test_force_replaces_an_earlier_bundle_only(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday.jpg").write_text("x")
    with pytest.raises(UsageError, match="not a bundle"):
        check_destination(tmp_path / "out", force=True, marker=MARKER)
    (tmp_path / "out" / MARKER).write_text("{}")
    check_destination(tmp_path / "out", force=True, marker=MARKER)
    with pytest.raises(UsageError, match="out exists\\.") as caught:
        check_destination(tmp_path / "out", force=False, marker=MARKER)
    assert "--force" in caught.value.hint


@pytest.mark.parametrize("place", [".", "onnx/..", "..", "../out"])
def test_where_one_stands_is_not_replaced(tmp_path, monkeypatch, place):
    here = tmp_path / "out" / ("below" if place == ".." else "")
    for folder in (here, here / "onnx"):
        folder.mkdir(parents=True)
    (tmp_path / "out" / MARKER).write_text("{}")
    monkeypatch.chdir(here)
    with pytest.raises(UsageError, match="is where you are"):
        check_destination(Path(place), force=True, marker=MARKER)


def test_a_way_back_is_not_made(tmp_path):
    with staged(tmp_path / "a" / ".." / "b") as folder:
        (folder / MARKER).write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    place = tmp_path / "report.json"
    for text in ("first", "second"):
        with whole(place) as file:
            file.write_text(text)
            assert file.suffix == ".json"
            assert not place.exists() or place.read_text() == "first"
    with pytest.raises(OSError, match="No space"), whole(place) as file:
        file.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert place.read_text() == "second"
    assert list(tmp_path.iterdir()) == [place]


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

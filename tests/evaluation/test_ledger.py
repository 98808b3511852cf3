"""The file of answers: what is kept, what is dropped, and what is refused."""

from __future__ import annotations

import errno
import os

import pytest

from visprune.errors import UsageError
from visprune.evaluation.answering import Answer
from visprune.evaluation.ledger import Ledger

ASKED = {"data": "a" * 64, "threads": 1}
FIRST, SECOND = Answer("1", "cat\u2028 \ud83d", "eos", 4, 16), Answer("2", error="Too long.")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Ledger(path, ASKED) as ledger:
        ledger.begin("b", "hash")
        ledger.add("hash", FIRST)
        ledger.add("hash", SECOND)
    return path


def known(path, **options):
    with Ledger(path, ASKED, **options) as ledger:
        return list(ledger.answers("hash").values())


def test_answers_come_back(path):
    text = [answer.text.encode(errors="replace").decode() for answer in (FIRST, SECOND)]
    assert [answer.text for answer in known(path)] == text
    assert known(path)[1] == SECOND


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_is_dropped_and_written_again(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Ledger(path, ASKED) as ledger:
        assert list(ledger.answers("hash")) == ["1"]
        ledger.add("hash", SECOND)
    assert path.read_bytes() == whole


def test_a_torn_first_line_begins_again(path):
    path.write_bytes(path.read_bytes()[:10])
    assert known(path) == []
    path.write_bytes(b"")
    assert known(path) == []


def test_nothing_is_mixed(path):
    for asked, what in (
        ({**ASKED, "threads": 2}, "begun with threads 1, and now it is 2"),
        ({**ASKED, "data": "b" * 64}, "begun with other data"),
    ):
        with pytest.raises(UsageError, match=what):
            Ledger(path, asked)
    with Ledger(path, ASKED) as ledger, pytest.raises(UsageError, match="b has changed since"):
        ledger.begin("b", "another hash")
    assert len(known(path)) == 2


def test_force_begins_again_but_replaces_nothing_else(path):
    assert known(path, force=True) == []
    path.write_text("my notes\n")
    for force in (False, True):
        with pytest.raises(UsageError, match="holds no answers"):
            Ledger(path, ASKED, force=force)
    assert path.read_text() == "my notes\n"


def test_a_line_that_is_no_answer(path):
    with path.open("a") as file:
        file.write('{"bundle": "hash", "key": 3}\n')
    with pytest.raises(UsageError, match=r"Line 5 of .*answers.jsonl"):
        Ledger(path, ASKED)


def test_two_runs_do_not_write_one_file(path):
    with Ledger(path, ASKED), pytest.raises(UsageError, match="Another run is writing"):
        Ledger(path, ASKED)
    assert len(known(path)) == 2


def test_a_full_disk_leaves_whole_lines(path, monkeypatch):
    before = path.read_bytes()
    real = os.write

    def full(file, data):
        if len(data) < 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data[: len(data) // 2])

    with Ledger(path, ASKED) as ledger:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(UsageError, match=r"No space left on device. Free some space"):
            ledger.add("hash", Answer("3", "cat"))
        monkeypatch.undo()
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        Ledger(tmp_path / "missing" / "answers.jsonl", ASKED)
    with pytest.raises(UsageError, match="cannot be written"):
        Ledger(tmp_path, ASKED)


def test_without_a_file_nothing_is_written():
    with Ledger(None, ASKED) as ledger:
        ledger.begin("b", "hash")
        ledger.add("hash", FIRST)
        assert ledger.answers("hash") == {"1": FIRST}

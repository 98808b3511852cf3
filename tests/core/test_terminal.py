"""Where the commands print."""

from __future__ import annotations

import sys

from visprune.terminal import note


def test_a_note_goes_to_stderr_or_nowhere(capsys, monkeypatch):
    note("one")
    assert capsys.readouterr() == ("", "one\n")
    monkeypatch.setattr(sys, "stderr", None)
    note("two")
    assert capsys.readouterr() == ("", "")

"""Answers depend neither on the processes that give them nor on interruptions; figures follow from them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import visprune
from visprune.demo.answers import right_answers
from visprune.demo.held_out import held_out
from visprune.errors import BundleError, InputError, UnsupportedError, UsageError
from visprune.evaluation import evaluate, read_questions
from visprune.evaluation.answering import Answer, AnswerSettings, Candidate
from visprune.evaluation.evaluator import AddedRows, asked_of_all
from visprune.evaluation.intervals import paired
from visprune.evaluation.questions import Question, Questions
from visprune.evaluation.summary import EvaluatedBundle, summarise
from visprune.evaluation.workers import Workers

SETTINGS = AnswerSettings(8)
COUNT = 40  # questions of `demo_data`


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The file of answers of `alone`."""
    return tmp_path_factory.mktemp("alone") / "answers.jsonl"


@pytest.fixture(scope="module")
def alone(demo_bundle, demo_data, answers):
    """The demo bundle, pruned and not, in one process that is not stopped."""
    both = [demo_bundle, f"{demo_bundle}@1"]
    return evaluate(both, demo_data, settings=SETTINGS, workers=Workers(1), output=answers)


class TestProof:
    def test_the_accuracy_is_that_of_the_demo(self, alone, demo_bundle):
        with visprune.load(demo_bundle) as pipeline:
            right = right_answers(pipeline, *held_out(COUNT))
        pruned, unpruned = alone.rows
        assert pruned.figures[0].value == sum(right) / COUNT
        assert pruned.questions == COUNT
        assert (pruned.kept, unpruned.kept) == (15 / 144, 1.0)
        assert alone.baseline == f"{demo_bundle}@1"
        assert unpruned.difference is unpruned.agreement is None
        assert pruned.difference.value == pytest.approx(pruned.figures[0].value - unpruned.figures[0].value)
        assert pruned.difference.high < 0

    def test_an_answer_that_the_limit_cuts_off_is_judged_by_its_text(self, alone, demo_bundle, demo_data):
        """An answer of one token is right, and counted as cut; a place has two tokens, and is wrong."""
        (row,) = evaluate(
            [f"{demo_bundle}@1"], demo_data, settings=AnswerSettings(1), workers=Workers(1)
        ).rows
        short = [question for question in read_questions(demo_data).usable if " " not in question.answers[0]]
        assert (row.questions, row.cut) == (COUNT, COUNT)
        assert alone.rows[1].figures[0].value == 1.0
        assert row.figures[0].value == len(short) / COUNT

    def test_four_processes_answer_alike(self, alone, demo_bundle, demo_data):
        both = [demo_bundle, f"{demo_bundle}@1"]
        assert evaluate(both, demo_data, settings=SETTINGS, workers=Workers(4)) == alone
        assert not multiprocessing.active_children()

    def test_a_run_that_was_killed_twice_answers_alike(
        self, alone, answers, demo_bundle, demo_data, tmp_path
    ):
        stopped = tmp_path / "stopped.jsonl"
        both = [demo_bundle, f"{demo_bundle}@1"]
        command = [sys.executable, "-m", "visprune", "eval", *map(str, both), "--data", str(demo_data)]
        command += ["--max-new-tokens", "8", "-o", str(stopped), "--no-baselines"]
        for processes, lines in (("1", 10), ("2", 55)):
            run = subprocess.Popen([*command, "--processes", processes], start_new_session=True)
            while not stopped.exists() or stopped.read_bytes().count(b"\n") < lines:
                assert run.poll() is None
                time.sleep(0.002)
            run.send_signal(signal.SIGKILL)
            run.wait()
            assert lines <= stopped.read_bytes().count(b"\n") < 2 * COUNT + 3
            wait_for_the_end_of_group(run.pid)
        assert evaluate(both, demo_data, settings=SETTINGS, workers=Workers(1), output=stopped) == alone
        assert sorted(stopped.read_bytes().splitlines()) == sorted(answers.read_bytes().splitlines())

    def test_what_is_answered_is_not_asked_again(self, alone, answers, demo_bundle, demo_data):
        called = []
        options = {"settings": SETTINGS, "output": answers, "progress": lambda *call: called.append(call)}
        evaluate([f"{demo_bundle}@1"], demo_data, **options)
        assert not called


def wait_for_the_end_of_group(group: int) -> None:
    """No worker outlives the process that began it."""
    for _ in range(2000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("a worker is left")


class TestRefused:
    def test_a_bundle_that_has_changed(self, asked, tiny_copy, edit_manifest, tmp_path):
        questions, output = asked(2), tmp_path / "answers.jsonl"
        before = evaluate([tiny_copy], questions, workers=Workers(1), output=output)
        edit_manifest(tiny_copy, "source", created="later")  # says when, and changes no answer
        assert evaluate([tiny_copy], questions, workers=Workers(1), output=output) == before
        edit_manifest(tiny_copy, "pruning", keep_tokens=8)
        with pytest.raises(UsageError, match=r"has changed since .*answers.jsonl was begun"):
            evaluate([tiny_copy], questions, workers=Workers(1), output=output)

    def test_other_data_and_other_settings(self, asked, tiny_bundle, tmp_path):
        output = tmp_path / "answers.jsonl"
        evaluate([tiny_bundle], asked(2), workers=Workers(1), output=output)
        kept = output.read_bytes()
        with pytest.raises(UsageError, match="begun with other data"):
            evaluate([tiny_bundle], asked(3), workers=Workers(1), output=output)
        with pytest.raises(UsageError, match="max_new_tokens 16, and now it is 3"):
            evaluate([tiny_bundle], asked(2), settings=AnswerSettings(3), workers=Workers(1), output=output)
        assert output.read_bytes() == kept
        found = evaluate([tiny_bundle], asked(3), workers=Workers(1), output=output, force=True)
        assert found.questions == 3

    def test_what_cannot_be(self, asked, tiny_bundle, tmp_path):
        with pytest.raises(BundleError, match="is not a bundle"):
            evaluate([tmp_path], asked(1))
        with pytest.raises(UsageError, match="no bundle to evaluate"):
            evaluate([], asked(1))
        with pytest.raises(UsageError, match="has no question"):
            evaluate([tiny_bundle], Questions("nothing", ()))
        with pytest.raises(UsageError, match=r"outside \(0, 1\]"):
            evaluate([f"{tiny_bundle}@1.5"], asked(1))
        for settings in ({"threads": 0}, {"max_new_tokens": 0}):
            with pytest.raises(UsageError, match=r"0 (threads|tokens)"):
                AnswerSettings(**settings)
        for workers in ({"processes": 0}, {"processes": 2, "ray": True}):
            with pytest.raises(UsageError):
                Workers(**workers)

    def test_a_killed_worker_is_told(self, asked, tiny_bundle, tmp_path):
        output = tmp_path / "answers.jsonl"

        def kill(_, done, total):
            if done == 1:
                for child in multiprocessing.active_children():
                    child.kill()

        with pytest.raises(UnsupportedError, match="worker process was ended"):
            evaluate([tiny_bundle], asked(60), workers=Workers(2), output=output, progress=kill)
        assert not multiprocessing.active_children()
        found = evaluate([tiny_bundle], asked(60), workers=Workers(1), output=output)
        assert found == evaluate([tiny_bundle], asked(60), workers=Workers(1))


class TestQuestionsThatCannotBeAsked:
    @pytest.fixture
    def questions(self, write, tmp_path):
        (tmp_path / "bad.png").write_bytes(b"no picture")
        good = {"image": "a.png", "question": "What?", "answers": ["x"]}
        return read_questions(write(good, {**good, "image": "bad.png"}, {**good, "question": "x" * 400}))

    def test_are_left_out_and_named(self, questions, tiny_bundle):
        (row,) = evaluate([tiny_bundle], questions, workers=Workers(1)).rows
        assert row.questions == 1
        assert [error.partition(" of ")[0] for error in row.errors] == ["Line 2", "Line 3"]
        assert "not a picture" in row.errors[0]
        assert "context" in row.errors[1]

    def test_end_a_strict_run(self, questions, tiny_bundle, tmp_path):
        output = tmp_path / "answers.jsonl"
        for _ in range(2):  # the second time some are known
            with pytest.raises(InputError, match="Line 2 of"):
                evaluate([tiny_bundle], questions, workers=Workers(1), output=output, strict=True)
            evaluate([tiny_bundle], questions, workers=Workers(1), output=output)

    def test_nothing_is_left_of_a_run_without_an_answer(self, questions, tiny_bundle, tmp_path):
        output, engines = tmp_path / "answers.jsonl", replace(SETTINGS, provider="tensorrt")
        with pytest.raises(UnsupportedError, match="needs engines of TensorRT"):
            evaluate([tiny_bundle], questions, settings=engines, workers=Workers(1), output=output)
        assert not output.exists()
        evaluate([tiny_bundle], questions, settings=SETTINGS, workers=Workers(1), output=output)
        with pytest.raises(UsageError, match="was begun with provider 'cpu'"):
            evaluate([tiny_bundle], questions, settings=engines, workers=Workers(1), output=output)
        assert output.exists()

    def test_if_there_are_no_others(self, questions, tiny_bundle):
        with pytest.raises(InputError, match=r"could not be asked any question. Line 2 of"):
            evaluate([tiny_bundle], replace(questions, usable=questions.usable[1:]), workers=Workers(1))


class TestFigures:
    def questions(self, metric, answers):
        usable = [Question(str(n), f"Line {n}", b"", "What?", texts) for n, texts in enumerate(answers)]
        return Questions("some", tuple(usable), metric)

    def figures(self, metric, answers, *said):
        questions = self.questions(metric, answers)
        bundles = [EvaluatedBundle(str(index), "m", unpruned=False) for index in range(len(said))]
        given = [{str(n): Answer(str(n), text) for n, text in enumerate(texts)} for texts in said]
        return summarise(questions, bundles, given)

    def test_yes_and_no(self):
        truth = ["yes"] * 30 + ["no"] * 70
        said = ["Yes"] * 24 + ["No"] * 6 + ["Yes"] * 10 + ["No"] * 60
        (row,) = self.figures("yes-no", [(text,) for text in truth], said).rows
        values = {figure.name: figure.value for figure in row.figures}
        precision, recall = 24 / 34, 24 / 30
        assert values == pytest.approx(
            {
                "accuracy": 0.84,
                "precision": precision,
                "recall": recall,
                "F1": 2 * precision * recall / (precision + recall),
                "yes ratio": 0.34,
            }
        )
        assert all(figure.low < figure.value < figure.high for figure in row.figures)

    def test_nobody_says_yes(self):
        (row,) = self.figures("yes-no", [("no",), ("no",)], ["no", "no"]).rows
        assert [figure.name for figure in row.figures] == ["accuracy", "yes ratio"]

    def test_a_mean_of_parts_is_bootstrapped(self):
        people = [("x",) * 3 + ("y",) * 7] * 50
        found = self.figures("vqa", people, ["x"] * 30 + ["z"] * 20, ["y"] * 50)
        first, second = found.rows
        assert first.figures[0].value == pytest.approx(0.9 * 0.6)
        assert first.figures[0].interval == second.difference.interval == "bootstrap"
        assert second.difference.value == pytest.approx(1 - 0.54)
        half = 1.96 * np.std([0.1] * 30 + [1.0] * 20) / np.sqrt(50)
        assert second.difference.low == pytest.approx(0.46 - half, abs=0.02)
        assert second.agreement.value == 0

    def test_a_bundle_that_a_baseline_beats_is_named(self):
        questions = self.questions("exact", [("x",)] * 100)
        said = [["x"] * 80 + ["z"] * 20, ["z"] * 40 + ["x"] * 60, ["z"] * 20 + ["x"] * 80]
        bundles = [EvaluatedBundle(name, "m", unpruned=False) for name in ("even", "worse", "random 4")]
        given = [{str(n): Answer(str(n), text) for n, text in enumerate(texts)} for texts in said]
        found = summarise(questions, bundles, given, [(0, 2), (1, 2)])
        even, worse, drawn = (row.equal_counts for row in found.rows)
        assert [(one.name, one.loses, one.difference.value) for one in (*even, *worse)] == [
            ("random 4", False, 0.0),
            ("random 4", True, pytest.approx(-0.2)),
        ]
        assert even[0].difference.low < 0 < even[0].difference.high
        assert (worse[0].difference.low, worse[0].difference.high) == paired(0, 20, 100)
        assert drawn == ()
        assert found.notes[-1].startswith("worse loses to random 4: exact match differs by -0.200 (-0.2")
        assert sum("loses to" in note for note in found.notes) == 1

    def test_agreement_is_of_what_is_said_right_or_wrong(self):
        found = self.figures("exact", [("7",), ("7",), ("7",)], ["7", "red", "up"], ["7.", "blue", "up"])
        row = found.rows[1]
        assert (row.figures[0].value, row.agreement.value) == (1 / 3, 2 / 3)
        assert row.difference.value == 0

    def test_a_bundle_against_itself(self, asked, tiny_bundle):
        found = evaluate([tiny_bundle, tiny_bundle], asked(5), workers=Workers(1))
        assert found.rows[1].difference.value == 0
        assert found.rows[1].difference.low < 0 < found.rows[1].difference.high
        assert found.rows[1].agreement.value == 1

    def test_several_models_are_told(self, asked, tiny_bundle, tiny_copy, edit_manifest):
        edit_manifest(tiny_copy, "source", model="other")
        found = evaluate([tiny_bundle, tiny_copy], asked(2), workers=Workers(1))
        assert "2 models (tiny, other)" in found.notes[0]
        assert "No bundle here is unpruned" in found.notes[1]


def test_a_candidate_is_a_directory_and_maybe_a_ratio(tmp_path):
    odd = tmp_path / "model@0.5"
    odd.mkdir()
    assert Candidate.parse(odd) == Candidate(odd)
    assert Candidate.parse(f"{odd}@0.25") == Candidate(odd, 0.25)
    assert Candidate.parse("user@host") == Candidate(Path("user@host"))
    assert Candidate.parse("a@0.50").name == "a@0.5"


def test_a_candidate_may_have_a_number_of_tokens(asked, tiny_bundle):
    counted = Candidate(tiny_bundle, keep_tokens=8)
    rows = evaluate([counted, f"{tiny_bundle}@0.5"], asked(2), workers=Workers(1)).rows
    assert [row.asked.name for row in rows] == [f"{tiny_bundle}, 8 tokens", f"{tiny_bundle}@0.5"]
    assert [row.kept for row in rows] == [0.5, 0.5]
    with pytest.raises(UsageError):
        evaluate([Candidate(tiny_bundle, ratio=0.5, keep_tokens=8)], asked(2))


def test_a_question_that_one_bundle_cannot_be_asked_is_left_out_for_all():
    questions = Questions("data", tuple(Question(key, key, b"", "?", ("x",)) for key in "abc"))
    answers = [
        {key: Answer(key, "x", "eos") for key in "abc"},
        {key: Answer(key, "x", "eos", error="too long" if key == "b" else None) for key in "abc"},
    ]
    common = asked_of_all(questions, answers)
    assert [question.key for question in common.usable] == ["a", "c"]
    assert common.skipped == ("1 questions could not be asked of every bundle, and are left out for all.",)
    rows = summarise(common, [EvaluatedBundle(name, "demo", False) for name in "pq"], answers).rows
    assert [(row.questions, row.errors) for row in rows] == [(2, ()), (2, ())]
    assert asked_of_all(questions, answers[:1]) is questions


def test_added_rows_are_asked_after_the_given_and_announced(asked, tiny_bundle, tiny_copy, tmp_path):
    questions, output = asked(3), tmp_path / "answers.jsonl"
    said, seen = [], []
    added = AddedRows((Candidate(tiny_copy, keep_tokens=8, label="random 8"),), ((0, 1),), ("A note.",))

    def baselines(candidates, opened):
        seen.append(([one.name for one in candidates], [one.path for one in opened]))
        return added

    options = {"workers": Workers(1), "output": output, "announce": said.append}
    evaluate([tiny_bundle], questions, **options)
    found = evaluate([tiny_bundle], questions, baselines=baselines, **options)
    assert seen == [([str(tiny_bundle)], [tiny_bundle])]
    assert said == [{str(tiny_bundle): 3}, {str(tiny_bundle): 0, "random 8": 3}]
    assert [row.asked.name for row in found.rows] == [str(tiny_bundle), "random 8"]
    assert [one.name for one in found.rows[0].equal_counts] == ["random 8"]
    assert found.notes[-1] == "A note."
    assert evaluate([tiny_bundle], questions, baselines=baselines, **options) == found
    assert len(said) == 2
    with pytest.raises(UsageError, match="other data"):
        evaluate([tiny_bundle], asked(2), baselines=baselines, **options)
    assert len(seen) == 2  # nothing is made for a run that is refused


def test_a_baseline_that_was_made_otherwise_is_asked_anew(
    asked, tiny_bundle, tiny_copy, edit_manifest, tmp_path
):
    said = []
    options = {"workers": Workers(1), "output": tmp_path / "answers.jsonl", "announce": said.append}
    added = AddedRows((Candidate(tiny_copy, keep_tokens=8, label="random 8"),))
    for eos in ((1,), (1, 300)):
        edit_manifest(tiny_copy, "decoder", eos_token_ids=eos)
        evaluate([tiny_bundle], asked(2), baselines=lambda *_: added, **options)
    assert said == [{str(tiny_bundle): 2, "random 8": 2}, {str(tiny_bundle): 0, "random 8": 2}]

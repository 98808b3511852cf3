"""One worker answers: what it keeps between questions."""

from __future__ import annotations

from visprune.bundle import Bundle
from visprune.evaluation import answering
from visprune.evaluation.answering import AnswerJob, AnswerSettings, Candidate, answer, close, identity
from visprune.runtime import load


def test_several_questions_about_an_image_encode_it_once(tiny_bundle, asked):
    one, settings = Candidate(tiny_bundle), AnswerSettings(max_new_tokens=4)
    job = AnswerJob(one, identity(Bundle.open(tiny_bundle), one), "", settings)
    questions = asked(3).usable
    try:
        found = [answer(job, question).text for question in questions]
        (pipeline,) = answering._open.values()
        assert (pipeline.caches.pictures.hits, pipeline.caches.pictures.misses) == (2, 1)
    finally:
        close()
    with load(tiny_bundle, threads=1) as plain:
        wanted = [plain.generate(q.image, q.prompt(""), max_new_tokens=4).text for q in questions]
    assert found == wanted

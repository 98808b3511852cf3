"""Tiny files of the published structures become the right questions; damaged ones are reported."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from visprune.errors import InputError, UsageError
from visprune.evaluation.formats import FORMATS, Files, read_questions
from visprune.evaluation.questions import check

SHORT, LETTER = (FORMATS[name].instruction for name in ("vqav2", "mmbench"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path


def put(folder, name, data):
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def image(folder, name):
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


def vqav2(folder, subtype="val2014"):
    people = ["net", "net", "netting", *["mesh"] * 7]
    asked = {
        "question_id": 458752000,
        "image_id": 458752,
        "question": "What is this photo taken looking through?",
    }
    return (
        {
            "info": {"version": "2.0"},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "license": {},
            "data_subtype": subtype,
            "questions": [asked, {**asked, "question_id": 458752001}],
        },
        {
            "info": {},
            "annotations": [
                {
                    "question_type": "what is this",
                    "multiple_choice_answer": "mesh",
                    "answers": [
                        {"answer": text, "answer_confidence": "yes", "answer_id": number}
                        for number, text in enumerate(people, 1)
                    ],
                    "image_id": 458752,
                    "answer_type": "other",
                    "question_id": 458752000,
                }
            ],
        },
        people,
    )


def test_vqav2(folder):
    asked, beside, people = vqav2(folder)
    picture = image(folder, "COCO_val2014_000000458752.jpg")
    files = Files(put(folder, "q.json", asked), put(folder, "a.json", beside), folder / "images")
    found = read_questions(files, "vqav2")
    assert (found.metric, found.instruction) == ("vqa", SHORT)
    (question,) = found.usable
    assert (question.key, question.image, question.answers) == ("458752000", picture, tuple(people))
    assert question.prompt(found.instruction) == f"What is this photo taken looking through?\n{SHORT}"
    (said,) = found.skipped
    assert said.startswith(f"Entry 2 of {files.data}: the question 458752001 is not in ")


def test_gqa(folder):
    record = {
        "semantic": [],
        "entailed": [],
        "equivalent": ["07333408"],
        "question": "Is it overcast?",
        "imageId": "2405722",
        "isBalanced": True,
        "groups": {"global": None, "local": "13-cloudy"},
        "answer": "no",
        "semanticStr": "",
        "annotations": {},
        "types": {"detailed": "weatherVerify"},
        "fullAnswer": "No, it is clear.",
    }
    data = put(folder, "gqa.json", {"07333408": record, "07333409": {**record, "imageId": "1"}})
    picture = image(folder, "2405722.jpg")
    found = read_questions(Files(data, images=folder / "images"), "gqa")
    assert found.metric == "exact"
    assert [(q.key, q.image, q.answers) for q in found.usable] == [("07333408", picture, ("no",))]
    assert found.skipped == (f"Entry 2 of {data}: there is no picture at {folder / 'images' / '1.jpg'}.",)


def test_textvqa(folder):
    record = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck"],
        "flickr_original_url": "https://example.org/x.jpg",
        "image_width": 1024,
        "image_height": 664,
        "answers": ["nous les gosses", "dakota", *["dakota digital"] * 8],
        "question_tokens": ["what"],
        "question_id": 34602,
        "set_name": "val",
    }
    picture = image(folder, "003a8ae2ef43b901.jpg")
    data = put(folder, "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [record]})
    found = read_questions(Files(data, images=folder / "images"), "textvqa")
    (question,) = found.usable
    assert (found.metric, question.key, question.image) == ("vqa", "34602", picture)
    assert question.answers == tuple(record["answers"])


def test_pope(folder):
    picture = image(folder, "COCO_val2014_000000310196.jpg")
    line = {
        "question_id": 1,
        "image": picture.name,
        "text": "Is there a snowboard in the image?",
        "label": "yes",
    }
    text = "\n".join([json.dumps(line), "", json.dumps({**line, "label": "maybe"}), "[]", "{"])
    data = put(folder, "pope.json", text)
    found = read_questions(Files(data, images=folder / "images"), "pope")
    assert found.metric == "yes-no"
    assert [(q.text, q.answers) for q in found.usable] == [(line["text"], ("yes",))]
    assert found.skipped == (
        f"Line 3 of {data}: the answer is 'maybe', not yes or no.",
        f"Line 4 of {data} is not a JSON object.",
        f"Line 5 of {data} is not a JSON object.",
    )


def scienceqa(folder):
    problem = {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map",
        "lecture": "Maps have four cardinal directions.",
        "solution": "...",
        "split": "test",
    }
    problems = {
        "4": problem,
        "5": {**problem, "image": None},
        "6": {**problem, "hint": "Look.", "answer": 2},
        "7": {**problem, "answer": 3},
    }
    splits = {"train": ["6"], "test": ["4", "5", "7", "9"], "minitest": ["4"]}
    return Files(
        put(folder, "problems.json", problems), put(folder, "pid_splits.json", splits), folder / "images"
    )


def test_scienceqa(folder):
    files = scienceqa(folder)
    pictures = [image(folder, f"test/{key}/image.png") for key in (4, 6, 7)]
    found = read_questions(files, "scienceqa")
    (question,) = found.usable
    assert (found.metric, question.key, question.image, question.answers) == (
        "choice",
        "4",
        pictures[0],
        ("A",),
    )
    assert question.prompt(found.instruction).splitlines() == [
        "Which of these states is farthest north?",
        "A. West Virginia",
        "B. Louisiana",
        "C. Arizona",
        LETTER,
    ]
    assert found.skipped == (
        f"The problem 9 is not in {files.data}.",
        f"Entry 2 of {files.data}: the answer 3 is none of 3 choices.",
    )


def test_scienceqa_of_a_split(folder):
    files = scienceqa(folder)
    image(folder, "test/4/image.png")
    mini = Files(files.data, files.annotations, files.images, "minitest")
    assert [q.key for q in read_questions(mini, "scienceqa").usable] == ["4"]
    with pytest.raises(UsageError, match=r"no split 'tset'. Did you mean 'test'"):
        read_questions(Files(files.data, files.annotations, files.images, "tset"), "scienceqa")


def test_mmbench(folder):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    coded = base64.b64encode(file.getvalue()).decode()
    head = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "split")
    rows = [
        ("241", "What is\nit?", "A hint", "cat", "dog", "", "", "B", "c", coded, "s", "dev"),
        ("1000241", "What is it?", "nan", "dog", "cat", "nan", "", "A", "c", "241", "s", "dev"),
        ("242", "What is it?", "", "cat", "dog", "", "", "C", "c", coded, "s", "dev"),
        ("243", "What is it?", "", "cat", "dog", "", "", "A", "c", "no base64", "s", "dev"),
    ]
    quoted = ["\t".join(f'"{cell}"' if "\n" in cell else cell for cell in row) for row in (head, *rows)]
    data = put(folder, "mmbench.tsv", "\n".join(quoted) + "\n")
    found = read_questions(data, "mmbench")
    assert found.metric == "choice"
    first, again = found.usable
    assert (first.key, first.text, first.choices, first.answers) == (
        "241",
        "A hint\nWhat is\nit?",
        ("cat", "dog"),
        ("B",),
    )
    assert (again.key, again.text, again.choices) == ("1000241", "What is it?", ("dog", "cat"))
    assert first.image == again.image == file.getvalue()
    assert [said.partition(": ")[2] for said in found.skipped] == [
        "the answer 'C' is none of the letters A, B.",
        "'image' is not base64.",
    ]
    assert found.skipped[0].startswith("Line 5 of ")


def test_jsonl(write):
    good = {"image": "a.png", "question": "What?", "answers": "x"}
    choice = {"image": "a.png", "question": "Which?", "choices": ["x", "y"], "answers": ["B"]}
    lines = {
        json.dumps(good): None,
        "": None,
        "{": "is not JSON",
        "[]": "is not a JSON object",
        json.dumps({**good, "image": "b.png"}): "there is no picture at",
        json.dumps({**good, "image": "../a.png"}): "names a picture outside",
        json.dumps({**good, "image": "/etc/hostname"}): "names a picture outside",
        json.dumps({**good, "image": "http://host/a.png"}): "http://host/a.png is a URL",
        json.dumps({**good, "image": "x" * 5000}): "there is no picture at",
        json.dumps({**good, "image": "data:,"}): "holds no data",
        json.dumps({**good, "image": "data:,x"}): None,
        json.dumps({**good, "image": 3}): "'image' is not a text",
        json.dumps({**good, "question": " "}): "'question' is not a text",
        json.dumps({"image": "a.png", "question": "What?"}): "has no 'answers'",
        json.dumps({**good, "answers": []}): "has no 'answers'",
        json.dumps({**choice, "answers": ["C"]}): "none of the letters A, B",
        json.dumps({**choice, "choices": ["x"]}): "has 1 choices",
        json.dumps({**choice, "choices": ["x", "z"]}): None,
    }
    data = write(*lines)
    found = read_questions(data)
    assert [question.key for question in found.usable] == ["1", "11", "18"]
    assert found.usable[1].image == b"x"
    assert found.usable[2].prompt("") == "Which?\nA. x\nB. z"
    numbered = {number: why for number, why in enumerate(lines.values(), 1) if why}
    assert len(found.skipped) == len(numbered)
    for said, (number, why) in zip(found.skipped, numbered.items(), strict=True):
        assert said.startswith(f"Line {number} of {data}")
        assert why in said
    with pytest.raises(InputError, match=rf"Line 3 of .* \(and {len(numbered) - 1} more\)") as caught:
        check(found, strict=True)
    assert "without --strict" in caught.value.hint
    check(found, strict=False)


def test_the_digest_is_of_texts_answers_and_pixels(write, tmp_path):
    good = {"image": "a.png", "question": "What?", "answers": ["x"]}
    before = read_questions(write(good)).digest()
    assert read_questions(write(good, name="other.jsonl")).digest() == before
    for changed in ({**good, "question": "Which?"}, {**good, "answers": ["y"]}):
        assert read_questions(write(changed)).digest() != before
    write(good)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert read_questions(tmp_path / "questions.jsonl").digest() != before


@pytest.mark.parametrize(
    ("form", "options", "what"),
    [
        ("vqav3", {}, r"no format 'vqav3'. Did you mean 'vqav2'"),
        ("gqa", {}, "needs --images"),
        ("gqa", {"images": ".", "annotations": "x"}, "no use for --annotations"),
        ("mmbench", {"images": "."}, "no use for --images"),
        ("gqa", {"images": "."}, "does not have the form of gqa: it holds a list"),
        ("textvqa", {"images": "."}, "does not have the form of textvqa: it holds a list"),
        ("mmbench", {}, "does not have the form of mmbench: it has no column"),
        ("vqav2", {"images": ".", "annotations": "missing.json"}, "does not have the form of vqav2"),
    ],
)
def test_files_that_are_something_else(folder, form, options, what):
    data = put(folder, "data.json", "[1, 2]")
    with pytest.raises(UsageError, match=what):
        read_questions(Files(data, **options), form)


def test_a_file_that_is_not_there(folder):
    for form, files in (
        ("jsonl", Files(folder / "no")),
        ("mmbench", Files(folder / "no")),
        ("gqa", Files(folder / "no", images=folder)),
    ):
        with pytest.raises(UsageError, match="cannot be read: No such file"):
            read_questions(files, form)


def test_a_record_cannot_name_a_picture_elsewhere(folder):
    record = {"question": "Is it?", "imageId": "../secret", "answer": "no"}
    data = put(folder, "gqa.json", {"1": record, "2": "text"})
    found = read_questions(Files(data, images=folder / "images"), "gqa")
    assert "outside" in found.skipped[0]
    with pytest.raises(InputError, match="outside") as caught:
        check(found, strict=False)
    assert caught.value.hint == "Correct the data."

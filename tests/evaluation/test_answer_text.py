"""Normal forms of answers, and the letter or the yes or no in them."""

from __future__ import annotations

import pytest

from visprune.evaluation.answer_text import plain, said_letter, vqa_plain, yes_or_no


@pytest.mark.parametrize(
    ("text", "said"), [(" Cat.\n", "cat"), ("a  CAT", "a cat"), ("3.5", "3.5"), ("...", ".."), ("", "")]
)
def test_plain(text, said):
    assert plain(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The cat.", "cat"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("don't", "dont"),
        ("dont", "dont"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("red, white and blue", "red white and blue"),
        ("t-shirt", "t shirt"),
        ("left (side)", "left side"),
        ("$5", "$5"),
        ("10:30", "10:30"),
        ("yes!", "yes"),
        ("An apple\nand a pear", "apple and pear"),
    ],
)
def test_vqa(text, said):
    assert vqa_plain(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes, there is.", "yes"),
        ("No.", "no"),
        ("There is not one.", "no"),
        ("Yes. No doubt.", "yes"),
        ("Nothing", "yes"),
        ("NO", "no"),
        ("", "yes"),
    ],
)
def test_yes_or_no_by_popes_rule(text, said):
    assert yes_or_no(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("B", "B"),
        (" B.", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("(B) a dog", "B"),
        ("B: a dog", "B"),
        ("The answer is B.", "B"),
        ("I see a dog, so the answer is (B)", "B"),
        ("a dog", "B"),
        ("A dog.", "B"),
        ("A CAT", "A"),
        ("D", None),
        ("An owl", None),
        ("A owl", None),
        ("", None),
        ("the same", None),
    ],
)
def test_letter(text, said):
    assert said_letter(text, ("a cat", "a dog", "the same")) == (said if text != "the same" else "C")


def test_a_text_of_two_choices_names_none():
    assert said_letter("red", ("red", "Red.")) is None

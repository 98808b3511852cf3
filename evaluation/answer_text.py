"""Normal forms of an answer's text, and the letter or the yes or no in it, for metrics to compare."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

__all__ = ["letters", "plain", "said_letter", "vqa_plain", "yes_or_no"]

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}


def plain(text: str) -> str:
    """Return a text in lower case, with single spaces and without a full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def vqa_plain(text: str) -> str:
    """Normalise a text by the rules of the VQA evaluation (https://visualqa.org/evaluation.html).

    The result is in lower case without articles, and number words up to ten are digits. Punctuation next to
    a space is dropped, other punctuation becomes a space; full stops and commas inside numbers stay. The
    rules add apostrophes to contractions by a table ("dont" becomes "don't"); here apostrophes are dropped
    from the answer and from the reference, which gives the same comparison.
    """
    text = " ".join(text.casefold().split()).replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"(?<=\s)[^\w\s.:$%&*^~|#]+|[^\w\s.:$%&*^~|#]+(?=\s|$)", "", text)
    text = re.sub(r"[^\w\s.:$%&*^~|#]|_", " ", text)
    words = (_DIGITS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def yes_or_no(text: str) -> str:
    """Return "no" if the first sentence has the word no or not, else "yes", as POPE's own script does."""
    words = re.findall(r"\w+", text.partition(".")[0].casefold())
    return "no" if {"no", "not"} & set(words) else "yes"


def letters(choices: Sequence[str]) -> str:
    """Return the letters of the choices, from A on."""
    return string.ascii_uppercase[: len(choices)]


def said_letter(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that an answer names, or None if it names none or several.

    These forms are tried in order: the text is a letter, bare or as "(B)", "B.", "B)" or "B:"; it begins
    with such a marked letter, and more text follows; it has "answer is B"; it is the text of one choice.
    """
    text = text.strip()
    known = letters(choices)
    patterns = (
        rf"[(\[]?([{known}])[)\].:,]*\s*$",
        rf"[(\[]([{known}])[)\]]|([{known}])[).:,](?=\s)",
        rf".*?\banswer(?: is)?:? *[(\[]?([{known}])\b",
    )
    for pattern in patterns if known else ():
        if found := re.match(pattern, text, re.DOTALL):
            return next(group for group in found.groups() if group)
    if len(text) == 1 and text.upper() in known:
        return text.upper()
    same = [letter for letter, choice in zip(known, choices, strict=True) if plain(choice) == plain(text)]
    return same[0] if len(same) == 1 else None

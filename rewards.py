"""
The verified rewards of MBPO (arXiv:2506.08022): what a text answers to a closed-ended question, is that right, and has
it the form that the question asks for? The built-in world's table reads answers by the same rules.
"""

import re

from data import LETTERS


def yes_or_no(answer):
    """POPE's own parsing: the text before the first full stop; 'No', 'no' or 'not' as a word is no, all else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "No" if {"No", "no", "not"} & set(words) else "Yes"


def plain(text):
    """Lower-case words, articles left out."""
    return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))


def closed_answer(text, question):
    """The answer that a text gives to a closed-ended question (format: data.py), or None if it gives none or several:
    rewards are computed with these rules, and a text that names every answer must not score.

    yesno    "Yes" or "No": the one of which a word occurs
    choice   a letter, alone or in front as "B." or "(B)", or in "the answer is B"; or the letter of the option's text
    number   the only number in the text, in digits
    word     the one of "choices" that occurs; without choices the whole text, but for articles and case

    A letter with others after it ("A. B. C.") is no answer; "A. cup" is.
    """
    kind, choices, bare = question["kind"], question.get("choices", []), text.strip()
    if kind == "yesno":
        words = set(plain(text).split())
        answers = [word for word, signs in (("Yes", {"yes"}), ("No", {"no", "not"})) if words & signs]
    elif kind == "choice":
        answers = set(re.findall(r"(?i:the answer is) \(?([A-Z])\b", text))
        if re.match(r"\(?[A-Z](?:[.):]|$)", bare):  # in front, and no other after it
            answers = set(re.findall(r"(?<!\w)\(?([A-Z])(?:[.):]|$)", bare))
        answers = answers or {LETTERS[i] for i, option in enumerate(choices) if plain(option) == plain(text)}
        known = set(LETTERS[: len(choices)])
        answers = [letter for letter in answers if letter in known] if len(answers) == 1 else []
    elif kind == "number":
        digits = re.findall(r"[0-9]+", re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text))
        answers = [number.lstrip("0") or "0" for number in digits]
    elif choices:
        answers = [choice for choice in choices if plain(choice) == plain(text)]  # "dark red" beside "red"
        answers = answers or [choice for choice in choices if f" {plain(choice)} " in f" {plain(text)} "]
    else:
        answers = [plain(text)] if plain(text) else []
    return answers[0] if len(answers) == 1 else None


def is_right(text, question):
    """Does the text give the true answer?"""
    said, truth = closed_answer(text, question), question["answer"]
    if said is None or said == truth:
        return said == truth
    return {"number": said == (truth.lstrip("0") or "0"), "word": plain(said) == plain(truth)}.get(
        question["kind"], False
    )


def in_form(text, question, words=0):
    """Is the text an answer in the form asked for: Yes or No, a letter, digits, so many words? And no longer than asked
    for: with `words` 0 it is that form and nothing else, else it starts with the form and has at most so many words.
    """
    said, answer = text.strip().removesuffix(".").lower(), closed_answer(text, question)
    if answer is None:
        return False
    if words:
        start = re.findall(r"\w+", answer.lower())
        return re.findall(r"\w+", said)[: len(start)] == start and len(said.split()) <= words
    if question["kind"] == "word":
        length = len(plain(question["answer"]).split())
        return plain(said) == plain(answer) and (bool(question.get("choices")) or len(plain(said).split()) == length)
    return said in (answer.lower(), f"({answer.lower()})")

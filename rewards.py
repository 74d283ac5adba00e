"""
The verified rewards of MBPO (arXiv:2506.08022): what a text answers to a closed-ended question, is that right, and has
it the form that the question asks for? Built-in world and benchmarks read answers by the same rules, but for those
that have an official rule of their own.
"""

import re
from decimal import Decimal

from data import LETTERS

ANSWER = re.compile(r"(?i)\banswer(?: is|:)[:\s]*")  # what stands in front of an answer
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
)
NUMBERS += "seventeen eighteen nineteen twenty".split()


def yes_or_no(answer):
    """POPE's own parsing: the text before the first full stop; 'No', 'no' or 'not' as a word is no, all else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "No" if {"No", "no", "not"} & set(words) else "Yes"


def plain(text):
    """Lower-case words, articles left out."""
    return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))


def mentioned(text, choices):
    """The choices that a text names, the longest first, so that "dark red" does not name "red" too."""
    text, named = f" {plain(text)} ", []
    for choice in sorted(choices, key=len, reverse=True):
        if (words := f" {plain(choice)} ") in text and words.strip():
            named.append(choice)
            text = text.replace(words, " | ")
    return named


def numbers(text):
    """The numbers in a text, as few digits as say them: digits with signs, points and commas, or words up to twenty."""
    digits = re.findall(r"(?<![\w.])[-+]?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?!\w)", text.replace("\u2212", "-"))
    digits += [str(NUMBERS.index(word)) for word in re.findall(r"[a-z]+", text.lower()) if word in NUMBERS]
    values = [f"{Decimal(number.replace(',', '')):f}" for number in digits]
    return [value.rstrip("0").rstrip(".") if "." in value else value for value in values]


def letters(text, choices, after=False):
    """The letters of options that a text names: one alone or in front as "B." "(b)" or "B:" (or, `after` words as "the
    answer is", any in front), and then by its text no other option; else those whose text it names.
    """
    known = LETTERS[: len(choices)]
    front = re.match(r"\(?([A-Z])\b" if after else r"\(?([A-Za-z])(?:\)|[.:,]|\s*$|\s+[-\u2013]\s)", text)
    by_text = [known[choices.index(choice)] for choice in mentioned(text[front.end() :] if front else text, choices)]
    if not front:
        return by_text or re.findall(rf"(?:(?i:option|choice) |\()([{known}])\b", text)
    others = re.findall(r"(?<!\w)\(?([A-Z])(?:[.):]|$)", text[front.end() :])
    return [front[1].upper(), *others, *by_text] if front[1].upper() in known else []


def closed_answer(text, question):
    """The answer that a text gives to a closed-ended question (format: data.py), or None if it gives none or several:
    rewards are computed with these rules, and a text that names every answer must not score. Case, quotes, emphasis,
    brackets and what stands in front ("The answer is", "Answer:") do not count.

    yesno    "Yes" or "No": the one of which a word occurs; of neither, "not" or a verb with "n't" is "No"
    choice   a letter, or that of the option whose text is named
    number   the only number, in digits or as a word
    word     the one of "choices" that is named; without choices the text itself, but for articles
    """
    kind, choices = question["kind"], question.get("choices", [])
    bare = re.sub(r"[*_`\"\u201c\u201d]|(?<!\w)['\u2018\u2019]|['\u2018\u2019](?!\w)", "", text).strip()
    answers = set()
    after = ANSWER.split(bare)[1:]  # all that is said to be the answer
    for part in after or [bare]:
        if kind == "yesno":
            words = re.findall(r"\w+", re.sub(r"n['\u2019]t\b", " not", part.lower()))
            signs = {word.capitalize() for word in words if word in ("yes", "no")}
            answers |= signs or ({"No"} if "not" in words else set())
        elif kind == "choice":
            answers |= set(letters(part.strip(), choices, bool(after)))
        elif kind == "number":
            answers |= set(numbers(part))
        else:
            answers |= set(mentioned(part, choices)) if choices else {plain(part)} - {""}
    return answers.pop() if len(answers) == 1 else None


def is_right(text, question):
    """Does the text give the true answer?"""
    said, truth = closed_answer(text, question), question["answer"]
    if question["kind"] == "number":
        return said is not None and [said] == numbers(truth)
    return said is not None and (said == truth or (question["kind"] == "word" and plain(said) == plain(truth)))


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

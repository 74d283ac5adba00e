"""
The verified rewards of MBPO (arXiv:2506.08022): what a text answers to a closed-ended question, is that right, and has
it the form that the question asks for? Built-in world and benchmarks read answers by the same rules, but for those
that have an official rule of their own.
"""

import re
from decimal import Decimal

from data import LETTERS

# What stands in front of an answer, and what says no without the word.
ANSWER = re.compile(
    r"(?i)\b(?:answer(?: to [^.:]*?)?(?: is|:)|(?:correct|right|best) (?:answer|option|choice)(?: is|:)?"
    r"|(?:answer|option|choice)(?= \(?[A-Z]\b))[:\s]*"
)
NEGATION = re.compile(
    r"(?:^|\b(?:is|are|was|were|does|do|did|has|have)|s)(?: ?n't| not)\b(?! (?:sure|certain|clear|know))"
    r"|^not\b|(?<!or )\bnot\W*$"
)
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def yes_or_no(answer):
    """POPE's own parsing: the text before the first full stop; 'No', 'no' or 'not' as a word is no, all else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "No" if {"No", "no", "not"} & set(words) else "Yes"


def plain(text):
    """Lower-case words and numbers with their signs, articles left out, unless nothing else is there."""
    words = re.findall(r"(?<![\w.])[-+]?[0-9]+(?:\.[0-9]+)?%?|\w+[+#]*", text.lower())
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def mentioned(text, choices):
    """The choices that a text names, the longest first, so that "dark red" does not name "red" too."""
    text, named = plain(text), []
    for choice in sorted(choices, key=lambda choice: len(plain(choice)), reverse=True):
        text, count = re.subn(rf"(?<!\S){re.escape(plain(choice))}(?!\S)", "|", text)
        named += [choice] * bool(count)
    return named


def numbers(text):
    """The numbers in a text, as few digits as say them: digits with signs, points and commas, or words below 100."""
    text = text.lower().replace("\u2212", "-")
    digits = re.findall(r"(?<![\w.])[-+]?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)(?!\w)", text)
    for word, one in re.findall(
        r"\b([a-z]+)(?:[- ]([a-z]+))?\b", re.sub(r"\bno one\b|[a-z]+ (?:hundred|thousand)", "", text)
    ):
        if word in TENS:
            digits.append(str(10 * TENS.index(word) + 20 + (ONES.index(one) if one in ONES[:10] else 0)))
        else:
            digits += [str(ONES.index(each)) for each in (word, one) if each in ONES]
    values = [f"{Decimal(number.replace(',', '')):f}" for number in digits]
    return [value.rstrip("0").rstrip(".") if "." in value else value for value in values]


def letters(text, choices, after=False):
    """The letters of options that a text names: one alone or in front as "B." "(b)" or "B:" (or, `after` words as "the
    answer is", any in front), and then by its text no other option; else those whose text it names.
    """
    known = LETTERS[: len(choices)]
    front = re.match(r"\(?([A-Z])\b" if after else r"\(?([A-Za-z])(?:\)|[.:,]|\s*$|\s+[-\u2013]\s)", text)
    rest = text[front.end() :] if front else text
    by_text = [known[choices.index(choice)] for choice in mentioned(rest, choices)]
    if not front:
        return by_text or re.findall(rf"(?:(?i:option|choice|it is|it's) |\(|^)([{known}])(?:\b(?! )|(?= is ))", text)
    letter = front[1].upper()
    if letter not in known:
        return []
    own = plain(rest) == plain(choices[known.index(letter)])  # "B. C", where option B is "C"
    return [letter, *([] if own else re.findall(r"(?<!\w)\(?([A-Z])(?:[.):]|$)", rest)), *([] if own else by_text)]


def closed_answer(text, question):
    """The answer that a text gives to a closed-ended question (format: data.py), or None if it gives none or several:
    rewards are computed with these rules, and a text that names every answer must not score. Case, quotes, emphasis,
    brackets and what stands in front ("The answer is", "Answer:") do not count.

    yesno    "Yes" or "No": the one of which a word occurs; of neither, "is not" and the like are "No"
    choice   a letter, or that of the option whose text is named
    number   the only number, in digits or as a word
    word     the one of "choices" that is named; without choices the text itself, but for articles
    """
    kind, choices = question["kind"], question.get("choices", [])
    bare = re.sub(r"</?\w+>|\\boxed|[*_`\"\u201c\u201d{}$]", "", text).replace("\u2019", "'")
    bare = re.sub(r"(?<!\w)['\u2018]|'(?!\w)", "", bare).strip()

    def read(part, after):
        """The answers that a part of the text gives; `after`: it stood behind "the answer is"."""
        if kind == "yesno":
            signs = {word.capitalize() for word in re.findall(r"\w+", part.lower()) if word in ("yes", "no")}
            return signs or {"No" for _ in NEGATION.findall(part.lower())}
        if kind == "choice":
            return set(letters(part.strip(), choices, after))
        if kind == "number":
            return set(numbers(part))
        return set(mentioned(part, choices)) if choices else {plain(part)} - {""}

    # All that is said to be the answer, else the text.
    answers = set().union(*(read(part, True) for part in ANSWER.split(bare)[1:])) or read(bare, False)
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
    said, answer, kind = text.strip().removesuffix(".").lower(), closed_answer(text, question), question["kind"]
    if answer is None:
        return False
    if words:
        start = plain(answer).split()
        return plain(said).split()[: len(start)] == start and len(said.split()) <= words
    if kind == "word":
        length = len(plain(question["answer"]).split())
        return plain(said) == plain(answer) and (bool(question.get("choices")) or len(plain(said).split()) == length)
    if kind == "number":
        return bool(re.fullmatch(r"[-+]?(?:0|[1-9][0-9]*)?(?:\.[0-9]+)?", said))
    return said in (answer.lower(), f"({answer.lower()})")

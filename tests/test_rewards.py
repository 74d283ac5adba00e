"""What a text answers to a closed-ended question, by hand: MBPO's rewards are computed with these rules."""

import pytest

from rewards import closed_answer, in_form, is_right, plain, yes_or_no

YESNO = {"kind": "yesno", "answer": "Yes"}
CHOICE = {"kind": "choice", "answer": "B", "choices": ["cup", "red pen", "fork"]}
NUMBER = {"kind": "number", "answer": "3"}
COLOUR = {"kind": "word", "answer": "red", "choices": ["red", "green"]}
WORD = {"kind": "word", "answer": "The Eiffel Tower"}
DARK = {"kind": "word", "answer": "dark red", "choices": ["red", "dark red"]}


@pytest.mark.parametrize(
    ("question", "text", "said", "right", "form"),
    [
        (YESNO, "Yes", "Yes", True, True),
        (YESNO, "yes.", "Yes", True, True),
        (YESNO, "Yes, there is a cup.", "Yes", True, False),
        (YESNO, "No", "No", False, True),
        (YESNO, "There is not a cup.", "No", False, False),
        (YESNO, "Yes and no", None, False, False),  # both: says nothing
        (YESNO, "There is a cup.", None, False, False),
        (YESNO, "nobody knows", None, False, False),
        (YESNO, "", None, False, False),
        (CHOICE, "B", "B", True, True),
        (CHOICE, "(B)", "B", True, True),
        (CHOICE, "B.", "B", True, True),
        (CHOICE, "B. red pen", "B", True, False),
        (CHOICE, "(A) cup", "A", False, False),
        (CHOICE, "The answer is B", "B", True, False),
        (CHOICE, "The answer is A or the answer is B", None, False, False),
        (CHOICE, "The red pen.", "B", True, False),
        (CHOICE, "A red pen", "B", True, False),  # the article is not the letter
        (CHOICE, "D", None, False, False),  # there is no D
        (CHOICE, "A, B, C", None, False, False),
        (CHOICE, "cup fork", None, False, False),
        (CHOICE, "A. B. C.", None, False, False),
        (CHOICE, "(A) (B)", None, False, False),
        (CHOICE, "B. A red pen, not vitamin C.", None, False, False),
        (NUMBER, "\u0663", None, False, False),  # digits of another script are not the form asked for
        (NUMBER, "3", "3", True, True),
        (NUMBER, "There are 3.", "3", True, False),
        (NUMBER, "03", "3", True, False),
        (NUMBER, "3 or 4", None, False, False),
        (NUMBER, "1,200 cups", "1200", False, False),
        (NUMBER, "9" * 5000, "9" * 5000, False, True),
        (NUMBER, "00 cups", "0", False, False),
        (NUMBER, "three", "3", True, False),
        (COLOUR, "red", "red", True, True),
        (COLOUR, "Red.", "red", True, True),
        (COLOUR, "It is red", "red", True, False),
        (COLOUR, "red green", None, False, False),
        (COLOUR, "reddish", None, False, False),
        (WORD, "the eiffel tower", "eiffel tower", True, True),
        (WORD, "Eiffel Tower", "eiffel tower", True, True),
        (WORD, "tower", "tower", False, False),
        (WORD, "i do not know what it is", "i do not know what it is", False, False),
        (DARK, "dark red", "dark red", True, True),
        (DARK, "it is dark red", "dark red", True, False),
    ],
)
def test_answers_to_closed_ended_questions(question, text, said, right, form):
    assert closed_answer(text, question) == said
    assert is_right(text, question) is right and in_form(text, question) is form


@pytest.mark.parametrize("question", [YESNO, CHOICE, NUMBER, COLOUR, WORD])
@pytest.mark.parametrize("text", ["\x00\ud800", "<image></s>", "(" * 3000, "\n", "²", "No" * 999])
def test_no_text_breaks_the_rules(question, text):
    assert not is_right(text, question)


@pytest.mark.parametrize("question", [YESNO, CHOICE, NUMBER, COLOUR, WORD, DARK])
def test_the_rules_give_full_marks_to_the_truth(question):
    assert is_right(question["answer"], question) and in_form(question["answer"], question)


def test_a_true_number_may_have_zeros_in_front():
    question = {"kind": "number", "answer": "007"}
    assert is_right("7", question) and is_right("007", question) and not is_right("70", question)
    assert is_right("0", {"kind": "number", "answer": "00"})


def test_all_answers_at_once_score_nothing():
    """What a policy would learn first if it could: to name every answer."""
    assert not is_right("Yes No", YESNO) and not is_right("1 2 3 4", NUMBER)
    assert not is_right("A B C", CHOICE) and not is_right("A. B. C. D.", CHOICE)
    assert not is_right("red, green", COLOUR)


@pytest.mark.parametrize(
    ("text", "words"),
    [("The cup, and a Pen!", "cup and pen"), ("an apple", "apple"), ("A", "a"), ("another theme", "another theme")],
)
def test_articles_case_and_marks_do_not_count(text, words):
    assert plain(text) == words


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        ("Yes", "Yes"),
        ("No", "No"),
        ("no, there is not", "No"),
        ("There is not. Yes", "No"),
        ("", "Yes"),
        ("NO", "Yes"),
        ("Yes. No", "Yes"),
        ("I know a nose", "Yes"),
    ],
)
def test_official_yes_no_parsing(answer, meaning):
    assert yes_or_no(answer) == meaning


@pytest.mark.parametrize(
    ("text", "question", "words", "form"),
    [
        ("Yes, there is a cup.", {"kind": "yesno", "answer": "Yes"}, 0, False),
        ("Yes, there is a cup.", {"kind": "yesno", "answer": "Yes"}, 5, True),
        ("Yes, there is a cup.", {"kind": "yesno", "answer": "Yes"}, 4, False),
        ("There is a cup, yes.", {"kind": "yesno", "answer": "Yes"}, 9, False),
        ("B. a pen", {"kind": "choice", "answer": "A", "choices": ["cup", "pen"]}, 3, True),
        ("a pen is B.", {"kind": "choice", "answer": "A", "choices": ["cup", "pen"]}, 9, False),
        ("3 cups", {"kind": "number", "answer": "3"}, 2, True),
        ("red or blue", {"kind": "word", "answer": "red", "choices": ["red", "blue"]}, 9, False),
    ],
)
def test_an_answer_longer_than_asked_for_has_no_form(text, question, words, form):
    assert in_form(text, question, words) is form


# One reader for case, quotes, emphasis, brackets and whole sentences; right is what a person reads.
Y = {"kind": "yesno", "answer": "Yes"}
C = {"kind": "choice", "answer": "B", "choices": ["cup", "a pen", "dark red pen", "red"]}
N = {"kind": "number", "answer": "3"}
W = {"kind": "word", "answer": "red", "choices": ["red", "dark red", "blue"]}
F = {"kind": "word", "answer": "grey"}
READINGS = [
    ("Yes", Y, "Yes"),
    ("yes.", Y, "Yes"),
    ("NO!", Y, "No"),
    ("**No**", Y, "No"),
    ('"No"', Y, "No"),
    ("No:", Y, "No"),
    ("Yes. No.", Y, None),
    ("The answer is no.", Y, "No"),
    ("Answer: Yes", Y, "Yes"),
    ("There isn't a cup.", Y, "No"),
    ("It is not there.", Y, "No"),
    ("Yes, it is not raining.", Y, "Yes"),
    ("maybe", Y, None),
    ("I know.", Y, None),
    ("", Y, None),
    ("'Yes'", Y, "Yes"),
    ("There isn’t one", Y, "No"),
    ("(yes)", Y, "Yes"),
    ("Nothing", Y, None),
    ("yes yes", Y, "Yes"),
    ("The answer is yes. The answer is no.", Y, None),
    ("B", C, "B"),
    ("b", C, "B"),
    ("B.", C, "B"),
    ("(B)", C, "B"),
    ("(b) a pen", C, "B"),
    ("B. a pen", C, "B"),
    ("A. pen", C, None),
    ("The answer is B", C, "B"),
    ("The answer is (B).", C, "B"),
    ("Answer: B", C, "B"),
    ("**B**", C, "B"),
    ("a pen", C, "B"),
    ("It is a pen.", C, "B"),
    ("dark red pen", C, "C"),
    ("a dark red pen", C, "C"),
    ("cup or pen", C, None),
    ("A. B. C. D.", C, None),
    ("A cup", C, "A"),
    ("a cup", C, "A"),
    ("E", C, None),
    ("B - a pen", C, "B"),
    ("Option B", C, "B"),
    ("A, B", C, None),
    ("", C, None),
    ("I think it is red", C, "D"),
    ("The answer is A. The answer is B.", C, None),
    ("B) a pen", C, "B"),
    ("B: a pen", C, "B"),
    ("3", N, "3"),
    ("3.", N, "3"),
    ("three", N, "3"),
    ("There are three cups.", N, "3"),
    ("3.0", N, "3"),
    ("-3", N, "-3"),
    ("3.5", N, "3.5"),
    ("1,000", N, "1000"),
    ("3 or 4", N, None),
    ("3 (three)", N, "3"),
    ("03", N, "3"),
    ("x3", N, None),
    ("3-4", N, None),
    ("**3**", N, "3"),
    ("The answer is 3.", N, "3"),
    ("Answer: three", N, "3"),
    ("none", N, None),
    ("3rd", N, None),
    ("−3", N, "-3"),
    ("3, I think", N, "3"),
    ("red", W, "red"),
    ("Red.", W, "red"),
    ("dark red", W, "dark red"),
    ("It is dark red.", W, "dark red"),
    ("red and dark red", W, None),
    ("red or blue", W, None),
    ("'red'", W, "red"),
    ("the red one", W, "red"),
    ("reddish", W, None),
    ("The answer is blue", W, "blue"),
    ("grey", F, "grey"),
    ("The grey", F, "grey"),
    ("Answer: Grey.", F, "grey"),
    ("", F, None),
]


SIGNED = {"kind": "choice", "answer": "A", "choices": ["5", "-5", "C", "C++"]}
READINGS += [
    ("5", SIGNED, "A"),
    ("-5", SIGNED, "B"),
    ("C++", SIGNED, "D"),
    ("B. C", {"kind": "choice", "answer": "B", "choices": ["A", "C", "B"]}, "B"),
    ("I'm not sure.", Y, None),
    ("I don't know", Y, None),
    ("It's not clear.", Y, None),
    ("It's not there.", Y, "No"),
    ("I think not.", Y, "No"),
    ("Whether it is there or not.", Y, None),
    ("Yes, the answer is clear.", Y, "Yes"),
    ("<answer>B</answer>", C, "B"),
    ("\\boxed{B}", C, "B"),
    ("B is correct", C, "B"),
    ("It is B.", C, "B"),
    ("Answer B", C, "B"),
    ("The correct option is B", C, "B"),
    ("The answer to the question is B.", C, "B"),
    ("two hundred", N, None),
    ("No one is there, 3 chairs", N, "3"),
    ("twenty-one", N, "21"),
    (".5", N, "0.5"),
    ("0.10", N, "0.1"),
    ("dark red, dark red", W, "dark red"),
    ("A", {"kind": "word", "answer": "A"}, "a"),
]


@pytest.mark.parametrize(("text", "question", "said"), READINGS)
def test_an_answer_is_read_as_a_person_reads_it(text, question, said):
    assert closed_answer(text, question) == said

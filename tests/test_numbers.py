"""Numbers as people write them: which ones are found in a text, and their values."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.data.answers import EXTRACTORS, answered, is_same_answer, normalize_answer
from grpo.training.evaluation import read_vote
from grpo.verifiers.numbers import find_last_number, parse_number

MINUSES = "-\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"
SPACES = " \u00a0\u2007\u2009\u202f"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # Decimals, with and without a digit before the point.
        ("a chance of .25", Fraction(1, 4)),
        ("-.25", Fraction(-1, 4)),
        ("It costs $.50 each", Fraction(1, 2)),
        ("that makes 3.", 3),  # the end of a sentence
        ("and so...8", 8),  # three points are not a decimal point
        # Exponents, in both notations.
        ("about 2e4 people", 20000),
        ("1.5E-3", Fraction(3, 2000)),
        ("6.02 x 10^23", 602 * 10**21),
        (r"$3 \times 10^{-2}$", Fraction(3, 100)),
        ("4·10⁶", 4_000_000),
        ("10^4", 10_000),
        # Thousands: commas, spaces of any width, apostrophes, LaTeX's.
        ("12,345,678", 12_345_678),
        ("45 000 tons", 45_000),
        ("1 234 567.5", Fraction(2469135, 2)),
        ("7'500", 7500),
        ("7_500", 7500),
        (r"7{,}500", 7500),
        (r"7\,500", 7500),
        (r"7,\!500", 7500),
        # Money, percent, emphasis.
        ("-€40", -40),
        ("€-40", -40),
        ("US$ 40", 40),
        ("CHF 40", 40),
        ("40%", 40),
        ("The total is **40**.", 40),
        ("__-40__", -40),
        (r"\$40", 40),
        # Fractions and mixed numbers, in text, in one sign and in LaTeX.
        ("3/4 of them", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("2 1/2 cups", Fraction(5, 2)),
        ("2½ cups", Fraction(5, 2)),
        (r"-\frac{7}{3}", Fraction(-7, 3)),
        (r"1\tfrac12", Fraction(3, 2)),
        # Lists and sequences have several; the last counts. A comma is no decimal point: 1,5 is
        # written like the list 1,2,3 and in English means it.
        ("1,5", 5),
        ("4, 6", 6),
        ("4,600,2", 2),
        ("1.234,56", 56),
        ("-1 2 3", 3),
        ("1 2 345", 345),  # a list, unless every separator separates thousands
        # A minus between two things is an operator or a range, whatever its length.
        ("8-3", 3),
        ("8 - 3", 3),
        ("from 8\u20133", 3),
        ("(8)-3", 3),
        ("8% -3%", -3),
        ("x=-3", -3),
        ("x = - 3", -3),
        # Dates, times and versions are not numbers; their last part is the last number.
        ("2025-03-09", 9),
        ("09.03.2025", 2025),
        ("9/3/2025", 2025),
        ("12:45", 45),
        ("version 3.11.7", 7),
        # An exponent, or a digit of a name, is no answer.
        ("an area of 5 m^2", 5),
        ("an area of 5 cm²", 5),
        ("so 7 is 2^3 - 1 or (2)^3 - 1", 1),
        ("7 is not 2^3", 7),
        ("x_1 = 7 and not x2", 7),
        (r"r \approx7", 7),
        # A unit is ignored, with or without a space; millions belong to the question.
        ("7kg", 7),
        ("the 7th", 7),
        ("7 million", 7),
        ("7 ± 0.5", 7),
        ("答案是72元", 72),
        # Signs that only look different.
        ("４２", 42),
        *((f"it is {minus}5", -5) for minus in MINUSES),
        *((f"it is 1{space}000", 1000) for space in SPACES),
        # No number.
        ("x = ±7", None),
        ("2^10", None),
        ("A4", None),
        ("none at all", None),
    ],
)
def test_the_last_number_of_a_text_and_its_value(text: str, number: object) -> None:
    found = find_last_number(text)
    assert (None if found is None else parse_number(found)) == number


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("**12**", 12),
        ("*12.*", 12),
        ("`12`", 12),
        ("$12$", 12),
        (r"\(12\)", 12),
        (r"\boxed{12}", 12),
        (r"$\boxed{\text{12}}$", 12),
        (r"\mathbf{-12}", -12),
        ("12,", 12),
        ("12 %", 12),
        ("12 percent", 12),
        ("12€", 12),
        ("12 USD", 12),
        ("£-12", -12),
        ("+12", 12),
        ("012", 12),
        ("1e3", 1000),
        ("2/4", Fraction(1, 2)),
        # Not one number: a list, an expression, a range, a unit, a date, a product.
        *(
            (text, None)
            for text in (
                *("1,5", "1, 5", "1 2", "3-4", "3 - 4", "±3", "5!", "2^10", "5 km", "12¢", "5k"),
                *("1/0", "1/2/3", "1.2.3", "2025-03-09", "nan", "inf", "1e", "e3", "0x10", "- 5"),
                *("", ".", "-", "$", "**", "1e99999999999999999999999"),
            )
        ),
    ],
)
def test_an_answer_that_is_one_number(answer: str, number: object) -> None:
    assert parse_number(answer) == number


@pytest.mark.parametrize(
    ("extract", "gold", "completion", "right"),
    [
        ("number", "5", "It is .5", 0.0),
        ("number", "0.5", "It is .5", 1.0),
        ("number", "5", "It is \u22125", 0.0),
        ("number", "\u22125", "It is -5", 1.0),
        ("number", "3", "It is 1e3", 0.0),
        ("number", "0", "It is 1\u202f000", 0.0),
        ("number", "1 000", "It is 1,000", 1.0),
        ("number", "4", "It is 3/4", 0.0),
        ("number", "2", "It is 5 m^2", 0.0),
        ("tag", "-5", "<answer>\u22125</answer>", 1.0),
        ("tag", "€1\u00a0000", "<answer>1000</answer>", 1.0),
        ("tag", "12", r"<answer>\boxed{12}</answer>", 1.0),
        ("tag", "0.75", "<answer>3/4</answer>", 1.0),
        ("tag", "1/3", "<answer>0.333333</answer>", 0.0),
        ("tag", "2010\u20132015", "<answer>2010-2015</answer>", 1.0),  # texts too
        ("tag", "caf\u00e9", "<answer>Cafe\u0301</answer>", 1.0),
        ("tag", r"\boxed{Paris}", "<answer>paris</answer>", 1.0),
        ("boxed", r"10\,000", r"\boxed{10{,}000}", 1.0),
    ],
)
def test_gold_and_given_go_through_the_same_reading(
    extract: str, gold: str, completion: str, right: float
) -> None:
    assert answered("q", gold, extract).verify(completion) == right


TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="0123456789.,-+eE /^*$%'_ \\{}×±½²\u2212\u00a0x", max_size=40),
    st.from_regex(r"-?\d{1,3}(\.\d+)?e-?\d{1,25}", fullmatch=True),
)


@given(TEXTS, TEXTS)
def test_any_text_is_an_answer_and_a_ballot_like_any_other(text: str, other: str) -> None:
    """Reading an answer again gives the same answer; equal answers are equal votes."""
    found = find_last_number(text)
    if found is not None:
        assert find_last_number(found) == found
        assert parse_number(found) is not None or "e" in found  # an exponent that no Decimal holds
    for extract in EXTRACTORS:
        example = answered("q", other, extract)
        ballot = read_vote(example, text)
        assert ballot == read_vote(example, text)
        assert example.verify(text) == float(
            ballot is not None and ballot == normalize_answer(other)
        )
    assert is_same_answer(text, text)
    assert is_same_answer(text, other) is is_same_answer(other, text)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.integers(1, 10**6))
def test_python_s_numbers_are_read_for_what_they_are(number: Decimal, below: int) -> None:
    assert parse_number(str(number)) == number
    assert parse_number(f"{number:,}") == number
    above = int(number)
    assert parse_number(f"{above}/{below}") == Fraction(above, below)


def test_huge_exponents_and_long_texts_cost_nothing() -> None:
    """Expanded, the first would take 400 MB a number; a quadratic search would take minutes."""
    huge = ["1e999999999", "10e999999998", "-1e999999999", "1e-999999999", "9e999999999999999999"]
    start = time.monotonic()
    assert is_same_answer(huge[0], huge[1])
    assert len({normalize_answer(text) for text in huge}) == 4
    assert not is_same_answer(huge[0], "1/3")
    pieces = "1|1 |000 |1,|1.|1/|$|*|-|^1|x1|1e|\\frac| "
    for piece in pieces.split("|"):
        text = piece * 50_000
        find_last_number(text), parse_number(text), normalize_answer(text + "x")
    assert time.monotonic() - start < 10

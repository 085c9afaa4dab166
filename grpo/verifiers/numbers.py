"""Finds numbers in texts, as people write them, and reads their exact values."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation
from fractions import Fraction

Number = Decimal | Fraction

LONGEST_FRACTION = 1000  # digits of a numerator or a denominator

# Signs that look like an ASCII one and mean the same.
LOOKALIKE_SIGNS: dict[int, str | int | None] = {
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"), " "),
    **dict.fromkeys(map(ord, "\u200a\u202f\u205f\u3000"), " "),
    **dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff"), ""),  # no width
    **str.maketrans("’＇，٬．٫％٪＄＋／⁄∕", "'',,..%%$+///"),
}
SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
SUPERSCRIPT_DIGITS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
VULGAR_FRACTION = re.compile(r"(\d?)([¼½¾⅐-⅞])")
LATEX_FRACTION = re.compile(
    r"(\d?)\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))"
)
LATEX_MARK = re.compile(r"\\!|\{,\}|\\[,;: ]|\\([%$])")
LATEX_PLAIN = {r"\!": "", "{,}": ","}
LATEX_WRAP = re.compile(r"\\(?:boxed|(?:text|math)(?:bf|rm|it)?|bm)\{(.*)\}", re.DOTALL)

CURRENCY = (
    r"(?:(?:US|CA|AU|NZ|HK|[ACRS])?\$|[€£¥₹₩₽₺₫₴₪₱฿₿]|Rs\.?"
    r"|(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD)(?![A-Za-z]))"
)
# A minus is no sign after a letter, a digit or a closing mark: 12-5 names 12 and 5. A space may
# follow it only after an equals sign.
SIGN = r"(?:(?<![^\W_])(?<![-)\]}.%])[-+]|(?<==\ )-\ |(?:±|\\pm)\ ?)"
POWER_PATTERN = r"(?:\^|\*\*)[{(]?(?P<%s>[-+]?\d+)[)}]?"
TOKEN = re.compile(
    rf"""
    (?P<sign>{SIGN})?
    (?:{CURRENCY}\ ?)?
    (?: (?P<run>\d+(?:[\ ,'_]\d+)*) (?P<decimals>(?:\.\d+)*)
      | (?<![\w.)\]])(?P<bare>\.\d+) )
    (?: (?P<over>(?:/\d+)+)
      | [eE](?P<exponent>[-+]?\d+)
      | \ ?(?:[x×*·⋅]|\\times|\\cdot)\ ?10{POWER_PATTERN % "times_ten"} )?
    (?:{POWER_PATTERN % "power"})?
    # These would be read as numbers, but are none: LaTeX commands, so \approx5 is no name;
    | \\[A-Za-z]+
    # a digit that belongs to a name (x2, x_{{2}}), and an exponent of a name or a bracket (m^2).
    | [A-Za-z]_?\{{?\d+(?:\.\d+)*
    | (?:[^\W\d_]|[)\]}}])\ ?\^\ ?[{{(]?[-+]?\d+(?:\.\d+)*
    """,
    re.VERBOSE,
)
UNIT = re.compile(rf"\s?(?:%|percent|{CURRENCY})$", re.IGNORECASE)

CURRENCY_BEFORE_SIGN = re.compile(rf"^{CURRENCY}\s?(?=[-+])")


def find_last_number(text: str) -> str | None:
    """Returns the last number in a text, or None.

    It stays as it is written, apart from signs: `-5` for any kind of minus, `1000` for `1 000`,
    `3/4` for `\\frac{3}{4}`. A power is not a number, except of ten: 2^10 has neither 2 nor 10.
    """
    for token in reversed(list(TOKEN.finditer(normalize_signs(text)))):
        named = extract_numbers(token)
        if named:
            return named[-1]
    return None


def parse_number(text: str) -> Number | None:
    """Returns the exact value of an answer that is one number and nothing else; else None.

    `1,234.50`, `$12`, `**-7**`, `50%`, `1e3`, `6 \\times 10^{23}` and `2 1/2` are numbers; percent
    and currency signs are ignored. Exponents are not expanded, so 1e999999999 costs nothing.
    """
    token = TOKEN.fullmatch(unwrap(normalize_signs(text)))
    named = [] if token is None else extract_numbers(token)
    return evaluate_number(named[0]) if len(named) == 1 else None


def normalize_signs(text: str) -> str:
    """Writes a text with one kind of minus, of space and of fraction."""
    text = text.translate(LOOKALIKE_SIGNS)
    text = LATEX_MARK.sub(lambda mark: LATEX_PLAIN.get(mark[0], mark[1] or " "), text)
    text = LATEX_FRACTION.sub(lambda m: f"{m[1] and m[1] + ' '}{m[2] or m[3]}/{m[4] or m[5]}", text)
    text = split_vulgar_fractions(text)
    return SUPERSCRIPT.sub(lambda m: "^" + m[0].translate(SUPERSCRIPT_DIGITS), text)


def split_vulgar_fractions(text: str) -> str:
    """Writes 1/2 for ½, with a space after a whole number before it."""
    return VULGAR_FRACTION.sub(
        lambda m: (
            f"{m[1] and m[1] + ' '}{unicodedata.normalize('NFKC', m[2]).translate(LOOKALIKE_SIGNS)}"
        ),
        text,
    )


def unwrap(text: str) -> str:
    """Removes emphasis, LaTeX wrappers, dollars, a full stop and percent or currency."""
    text = text.strip(" \n\t\r*_`").rstrip(".,;:")
    for _ in range(3):  # enough for \boxed{\text{$5$}}
        wrapped = LATEX_WRAP.fullmatch(text)
        text = (wrapped[1] if wrapped else text).removeprefix(r"\(").removesuffix(r"\)")
        text = text.strip(" \n\t\r*_`").rstrip(".,;:")
        if text.startswith("$") and text.endswith("$"):
            text = text[1:-1].strip()
    return UNIT.sub("", CURRENCY_BEFORE_SIGN.sub("", text.removeprefix("$").strip())).rstrip(".")


def extract_numbers(token: re.Match[str]) -> list[str]:
    """Returns the numbers in a token: one, the parts of a list, date or version, or none."""
    sign, run, power = token["sign"] or "", token["run"], token["power"]
    if (run is None and token["bare"] is None) or "±" in sign or "pm" in sign:
        return []
    decimals = token["bare"] or token["decimals"]
    *before, last = [""] if run is None else split_run(run)
    if decimals.count(".") > 1:
        return [*before, last, *decimals[1:].split(".")]
    minus = "-" if "-" in sign else ""
    last_minus = "" if before else minus  # in -1 2, the minus belongs to the 1
    if token["over"]:
        below = token["over"][1:].split("/")
        if power or decimals or len(below) > 1 or not is_fraction(last, below[0]):
            return [] if power else [*before, last, *below]
        if len(before) == 1 and is_mixed(before[0], last, below[0]):
            return [f"{minus}{before[0]} {last}/{below[0]}"]
        return [*before, f"{last_minus}{last}/{below[0]}"]
    number, exponent = last + decimals, token["exponent"] or token["times_ten"]
    if power:
        if number != "10" or exponent:
            return []
        number, exponent = "1", power
    return [*before, last_minus + number + (f"e{exponent}" if exponent else "")]


def split_run(run: str) -> list[str]:
    """Splits digits with signs between them; returns one number if these separate thousands.

    Commas between thousands stay, since everybody reads them as such.
    """
    by_space = run.split(" ")
    if len(by_space) > 1 and are_thousands(by_space):
        return ["".join(by_space)]
    pieces = []
    for piece in by_space:
        groups = re.split("[,'_]", piece)
        marks = set(re.findall("[,'_]", piece))
        if len(marks) == 1 and are_thousands(groups):
            pieces.append((marks & {","} and ",".join(groups)) or "".join(groups))
        else:
            pieces += groups
    return pieces


def are_thousands(groups: list[str]) -> bool:
    first, *others = groups
    return len(first) <= 3 and first[0] != "0" and all(len(group) == 3 for group in others)


def is_fraction(above: str, below: str) -> bool:
    return max(len(above), len(below)) <= LONGEST_FRACTION and int(below) != 0


def is_mixed(whole: str, above: str, below: str) -> bool:
    return len(whole) <= LONGEST_FRACTION and int(remove_commas(above)) < int(below)


def evaluate_number(number: str) -> Number | None:
    """Returns the value of a number from `extract_numbers`; None if Decimal can't hold it."""
    if "/" in number:
        whole, _, part = remove_commas(number).removeprefix("-").rpartition(" ")
        value = Fraction(int(whole or 0)) + Fraction(part)
        return -value if number.startswith("-") else value
    try:
        return Decimal(remove_commas(number))
    except InvalidOperation:
        return None


def remove_commas(number: str) -> str:
    return number.replace(",", "")

"""The final number of a written solution, read exactly and in time linear in the length of the text.

The rules, in their order:

1. Text after the end of the turn does not count.
2. Of the markers `####`, `\\boxed{}` and `Final Answer` the last one that a number follows wins, and the first number
   after it counts. Headings such as `#### Step 1` are no markers.
3. Without a marker the number after the last "answer is" or "answer:" counts, and without that the last number.

Numbers may have thousands separators, a currency, a unit, markdown or LaTeX around them, and may be decimals or
fractions. What stays ambiguous is read literally: numbers in words, `1 080`, `18 or 20`, `2 million`, `3:30`.
"""

import re
from collections import deque
from fractions import Fraction

# A longer number is no answer, and its arithmetic would no longer be linear.
MAX_NUMBER_LENGTH = 100

_TURN_START = re.compile(
    r"\s*(?:(?:<s>|<bos>|<\|begin_of_text\|>|<\|assistant\|>|<\|im_start\|>assistant|<start_of_turn>model"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>)\s*)+"
)
_TURN_END = re.compile(
    r"<\|(?:im_end|im_start|end|endoftext|end_of_text|eot_id|eom_id|start_header_id|return|user|system|assistant|pad)\|>"
    r"|</s>|<eos>|<pad>|<end_of_turn>|<start_of_turn>|\[/?INST\]|(?<=\n)[ \t]{0,8}(?:Question|Human|User)[ \t]{0,8}:"
)

_MINUS_SIGNS = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
_INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
_CHARACTERS = str.maketrans(
    dict.fromkeys(_MINUS_SIGNS, "-")
    | dict.fromkeys(_INVISIBLE)
    | dict.fromkeys("\u2044\u2215", "/")
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
    | {"\uff04": "$", "\uff0c": ",", "\uff0e": ".", "\uff05": "%"}
)
_REWRITES = (
    (re.compile(f"(?<=[0-9])(?=[{''.join(_VULGAR)}])"), " "),
    (re.compile(f"[{''.join(_VULGAR)}]"), lambda match: _VULGAR[match.group()]),
    (re.compile(r"\\!"), ""),
    # What joins the groups of digits in type, be it LaTeX or a space that does not break.
    (re.compile(r"(?<=[0-9])(?:\{\\?,\}|\\[,;: ]|[~\u00a0\u2009\u202f])(?=[0-9]{3})"), ","),
    (re.compile(r"\\(?:text|math|mbox|hbox|operatorname)(?:bf|it|rm|sf|tt|normal)?\s{0,4}\{"), "{"),
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r"(?<=[0-9])\\(?=[dtc]?frac)"), r" \\"),
    (
        re.compile(
            r"\\[dtc]?frac\s{0,4}\{\s{0,4}(-?[0-9][0-9,.]{0,50})\s{0,4}\}\s{0,4}\{\s{0,4}([0-9][0-9,.]{0,50})\s{0,4}\}"
        ),
        r"\1/\2",
    ),
    (re.compile(r"\\[dtc]?frac\s{0,4}([0-9])\s{0,4}([0-9])"), r"\1/\2"),
)

# Groups of three digits, or of two as in India, which are counted since they may lead to no last group of three.
_DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[1-9][0-9]?(?:,[0-9]{2}){1,4},[0-9]{3}(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![\w.)])\.[0-9]+)"
_NUMBER = re.compile(
    # A hyphen after a word, a number or a bracket joins or subtracts.
    rf"(?P<sign>(?<![^\W_])(?<![)\]}}.%])[-+](?:[$€£¥*_`{{}}]|\\[(\[])*+(?:(?<=[$€£¥])[ ])?)?"
    r"(?:(?P<whole>[0-9]{1,9})[ ]{1,2}(?=[0-9]{1,9}[ ]?/[ ]?[0-9]))?"
    rf"(?P<numerator>{_DECIMAL})(?:[ ]{{0,2}}/[ ]{{0,2}}(?P<denominator>{_DECIMAL}))?"
)
_MARKER = re.compile(
    r"(?P<heading>\#{4,})|(?P<boxed>\\f?boxed\b)"
    r"|\bfinal\s{1,3}answer\b(?=[ \t*_`\"')]{0,8}"
    r"(?:[-+:=→\n\\($€£¥0-9]|is\b|was\b|of\b|would\b|should\b|will\b|comes\b|equals\b))",
    re.IGNORECASE,
)
_PHRASE = re.compile(r"\banswers?\b[^.\n:=0-9]{0,40}?(?:\bis\b|\bare\b|\bwas\b|\bequals\b|[:=])", re.IGNORECASE)

_LABEL = re.compile(
    r"\b(?:step|part|case|phase|stage|section|question|problem|example|method|approach|solution|option|task|point"
    r"|scenario|equation|figure|table|note)s?[\s#*_.-]{0,4}\Z",
    re.IGNORECASE,
)
_ANSWER_WORD = re.compile(r"\b(?:answer|total|result)\b", re.IGNORECASE)
_STATEMENT = re.compile(rf"{_ANSWER_WORD.pattern}|\b(?:is|are|was|were|equals?|gives?)\b|[=:≈]", re.IGNORECASE)
_LETTER = re.compile(r"(?<!\\)\b[^\W\d_]")
_HEADING_WORDS = re.compile(r"(?:[.)]|:)[*_]{0,2}\s{1,3}[*_]{0,2}[^\W\d_]")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> Fraction | None:
    """
    The final number of a solution, by the rules of this file.

    Args:
        text (`str`): What the model wrote, of any length.

    Returns:
        `Fraction`, *optional*: Its value; `None` if there is no number, or one that is divided by zero or longer than
        100 characters.

    Example:

    ```python
    >>> from mixturekit.trainers.number_extraction import extract_answer

    >>> extract_answer("Half of $2{,}160 is \\\\boxed{\\\\$1,080.00}.")
    Fraction(1080, 1)
    >>> extract_answer("She has 3 apples left. The answer is -3/4 kg, not 2.")
    Fraction(-3, 4)
    ```
    """
    text = _normalise(text)
    marked, unmarked = _read_markers(text)
    if marked:
        return marked[-1]
    end = len(unmarked)
    for phrase in reversed(list(_PHRASE.finditer(unmarked))):
        number = _NUMBER.search(unmarked, phrase.end(), end)
        if number:
            return _values(number)[0]
        end = phrase.start()
    last = deque(_NUMBER.finditer(unmarked), maxlen=1)
    return _values(last[0])[-1] if last else None


def has_marked_answer(text: str) -> bool:
    """Whether `####`, `\\boxed{}` or `Final Answer` is in the first turn of `text`, with a number after it."""
    return any(value is not None for value in _read_markers(_normalise(text))[0])


def gold_answer(answer: str) -> Fraction:
    """
    The number of a solution of the data set: what follows its last `####`, or all of it if it has none.

    Raises:
        ValueError: If there is no number, or more than one.
    """
    numbers = list(_NUMBER.finditer(_normalise(answer.rpartition("####")[2])))
    values = [value for number in numbers for value in _values(number)]
    if len(values) != 1 or values[0] is None:
        raise ValueError(f"The answer {answer[-80:]!r} must end in one number, after `####`.")
    return values[0]


def end_of_turn(text: str) -> str:
    """The first turn of `text`, without the marks of a chat that open it."""
    opening = _TURN_START.match(text)
    start = opening.end() if opening else 0
    end = _TURN_END.search(text, start)
    return text[start : end.start() if end else len(text)]


def _normalise(text: str) -> str:
    """The first turn, in which each sign, separator and fraction is written in one way."""
    text = end_of_turn(text).translate(_CHARACTERS)
    for pattern, written in _REWRITES:
        text = pattern.sub(written, text)
    return text


def _values(number: re.Match) -> list[Fraction | None]:
    """What a match of `_NUMBER` stands for: one number, or two where it only looks like `2 1/2`."""
    if len(number.group()) > MAX_NUMBER_LENGTH:
        return [None]
    sign = -1 if (number["sign"] or "").startswith("-") else 1
    value = Fraction(number["numerator"].replace(",", ""))
    if number["denominator"] is not None:
        denominator = Fraction(number["denominator"].replace(",", ""))
        if not denominator:
            return [None]
        value /= denominator
    if number["whole"] is None:
        return [sign * value]
    whole = int(number["whole"])
    return [sign * (whole + value)] if value < 1 else [Fraction(sign * whole), value]


def _read_markers(text: str) -> tuple[list[Fraction | None], str]:
    """The first number after each marker that has one, and the text without the headings that only look like them."""
    markers = list(_MARKER.finditer(text))
    values: list[Fraction | None] = []
    kept, position, next_item = [], 0, 1
    for index, marker in enumerate(markers):
        is_last = index + 1 == len(markers)
        end = len(text) if is_last else markers[index + 1].start()
        if marker["boxed"]:
            end = _closing_brace(text, marker.end(), end)
        number = _NUMBER.search(text, marker.end(), end)
        if number is None:
            continue
        if not marker["heading"]:
            values.append(_values(number)[0])
            continue
        before, after = text[marker.end() : number.start()], text[number.end() : end]
        has_body = not is_last or bool(after.partition("\n")[2].strip())
        is_item = number.group() == str(next_item) and has_body and _HEADING_WORDS.match(after) is not None
        if is_item or _LABEL.search(before):
            next_item += is_item
            kept.append(text[position : marker.start()])
            position = number.end()
        elif not _is_title(before, has_body):
            values.append(_values(number)[0])
    return values, " ".join([*kept, text[position:]])


def _is_title(before: str, has_body: bool) -> bool:
    """Whether the words between `####` and the first number are the title of what comes next, not a statement."""
    line, line_end, _ = before.partition("\n")
    if _LETTER.search(line) is None:
        return False
    if line_end:
        return _ANSWER_WORD.search(line) is None
    return has_body and _STATEMENT.search(line) is None


def _closing_brace(text: str, start: int, end: int) -> int:
    """Where the group that opens at `start` is closed; `end` if it is cut off."""
    depth = 0
    for brace in _BRACE.finditer(text, start, end):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth <= 0 and brace.group() == "}":
            return brace.start()
    return end

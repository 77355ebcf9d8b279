"""The final number of a solution: which one counts, how it may be written, and that no text takes long."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixturekit.trainers.number_extraction import end_of_turn, extract_answer, gold_answer, has_marked_answer

# The same examples in every run, and none that fails because the machine is busy.
explore = settings(derandomize=True, deadline=None, max_examples=250)

LONG = 1 << 17
WORDS = st.text("abcdefghij klmnopqrstuvwxyz,;\n", max_size=40)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # The last marker wins, and the first number after it counts.
        ("#### 3\nNo, wait.\n#### 18", 18),
        ("\\boxed{3} and then \\boxed{18}", 18),
        ("#### 3\nFinal Answer: 18", 18),
        ("Final Answer: 3\n\\boxed{18}", 18),
        ("#### 18 apples and 5 pears, 3 each", 18),
        ("**Final Answer**\n\nShe earns $18 in 7 days.", 18),
        ("The final answer is: $\\boxed{18}$. I hope it is correct, 100%.", 18),
        ("#### 18\n18 is 3 * 6.", 18),
        ("\\boxed{\\boxed{18}}", 18),
        ("\\boxed{x = 18} of 20", 18),
        # An empty marker is none.
        ("####\n#### 18", 18),
        ("#### 18\nso 3\n####", 18),
        ("\\boxed{} 7\n\\boxed{18}", 18),
        ("\\boxed{18} or \\boxed{} 7", 18),
        ("####\n18", 18),
        ("\\boxed{18", 18),
        # Headings are no answers.
        ("#### Step 1\nShe has 5 + 3 = 8.\n#### Step 2\nThat makes 8 * 2 = 16", 16),
        ("#### Step 1: add\n5 + 3 = 8\n#### 8\n", 8),
        ("#### Step 1", None),
        ("#### 8\n#### **Step #3:** check", 8),
        ("#### 1. Add\nthree and five\n#### 2. Say it\nThe answer is 8", 8),
        ("#### Solution\n5 + 3 = 8\n8 + 1 = 9", 9),
        ("#### Calculation:\n5 + 3 = 8", 8),
        ("#### Answer:\n18 of 20", 18),
        ("#### Solution: 18\n(of 20)", 18),
        ("#### Final Answer\nThe total is 18, not 20.", 18),
        ("#### Cost of 3 shirts\nEach is 20, so 60", 60),
        ("#### The answer is 18", 18),
        ("#### Final Answer: 18", 18),
        ("#### Janet makes $18 every 1 day", 18),
        ("#### 18. Therefore she has 18 of 20.", 18),
        ("### Step 3\nSo the answer is 18", 18),
        # Text after the end of the turn does not count.
        ("#### 18<|im_end|>\n<|im_start|>user\n#### 20", 18),
        ("The answer is 18</s> 20", 18),
        ("#### 18<|end|><|user|>And #### 20?<|end|>", 18),
        ("#### 18\n\nQuestion: Tom has 5 dogs.\nAnswer: #### 5", 18),
        ("<|end|>#### 18", None),
        ("<|assistant|>\n#### 18<|end|>", 18),
        # Without a marker: the number after "answer is", else the last one.
        ("The answer is 18. That leaves 3.", 18),
        ("Answer: 18\n(of 20)", 18),
        ("The answer is 3. Sorry, the answer is 18, not 20", 18),
        ("The answer to the problem is $18, for 2 people", 18),
        ("3 and 5 make 8, then 18 in all.", 18),
        ("We get the final answer by adding 12 and 6, so 18.", 18),
        ("", None),
        ("I do not know.", None),
        ("####", None),
        # A gold answer of 0 is an answer.
        ("#### 0", 0),
        ("There are none left: \\boxed{0}", 0),
    ],
)
def test_which_number_counts(text, number):
    assert extract_answer(text) == number


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("$18", "18"), ("\\$18", "18"), ("$18$", "18"), ("$\\$18$", "18"), ("\\(18\\)", "18"), ("€18", "18"),
        ("US$18", "18"), ("USD 18", "18"), ("18 dollars", "18"), ("18km", "18"), ("25%", "25"), ("25\\%", "25"),
        ("**18**", "18"), ("__18__", "18"), ("`18`", "18"), ("*18*", "18"), ("**$18**", "18"), ("<b>18</b>", "18"),
        ("1,080", "1080"), ("1{,}080", "1080"), ("1\\,080", "1080"), ("1,\\!080", "1080"), ("1\u202f080", "1080"),
        ("2,880,000.50", "2880000.5"), ("1,00,000", "100000"), ("1,080.", "1080"), ("3, 5", "3"), ("3,5,7", "3"),
        ("18~000", "18000"), ("１８", "18"), ("5.0", "5"), ("5.", "5"), (".5", "1/2"), ("0.50", "1/2"),
        ("007", "7"), ("+5", "5"),
        ("-5", "-5"), ("\u22125", "-5"), ("\u20135", "-5"), ("-$5", "-5"), ("$-5", "-5"), ("\u2212\\$5", "-5"),
        ("$\u2212$5", "-5"), ("-**5**", "-5"), ("-$ 5", "-5"), ("- 5", "5"), ("10-5", "10"), ("5\u20137", "5"),
        ("1/2", "1/2"), ("-3/4", "-3/4"), ("6 / 4", "3/2"), ("\\frac{1}{2}", "1/2"), ("\\dfrac{3}{4}", "3/4"),
        ("\\frac12", "1/2"), ("-\\frac{1}{2}", "-1/2"), ("\\frac{-1}{2}", "-1/2"), ("\\frac{1,080}{2}", "540"),
        ("2 1/2", "5/2"), ("2\\frac{1}{2}", "5/2"), ("2½", "5/2"), ("¾", "3/4"), ("-2 1/2", "-5/2"), ("48 48/2", "48"),
        ("\\text{18}", "18"), ("18\\text{ apples}", "18"), ("\\text{about }18", "18"), ("\\mathbf{18}", "18"),
        ("\\text{\\$}18", "18"), ("\\textbf{$1,080}", "1080"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("marker", ["#### {}", "####{}", "\\boxed{{{}}}", "**Final Answer:** {}", "The answer is {}"])
def test_how_a_number_may_be_written(marker, written, number):
    assert extract_answer(f"3 + 4 = 7\n{marker.format(written)}") == Fraction(number)


@pytest.mark.parametrize("text", ["#### 5/0", "\\boxed{\\frac{5}{0}}", "#### " + "1" * 200, "7 or 5/0"])
def test_what_has_no_value_is_no_answer_and_earns_no_bonus(text):
    assert extract_answer(text) is None and not has_marked_answer(text)


@st.composite
def written_numbers(draw):
    """A number, and one of the many ways to write it."""
    whole = draw(st.one_of(st.integers(0, 20), st.integers(0, 10**9)))
    decimals = draw(st.sampled_from(["", ".0", ".00", ".5", ".25", "."]))
    negative = draw(st.booleans())
    separator = draw(st.sampled_from(["", ",", "{,}", "\\,", "\u202f"]))
    digits = f"{whole:,}".replace(",", separator) + decimals
    minus = draw(st.sampled_from(["-", "\u2212", "\u2013"])) if negative else ""
    currency = draw(st.sampled_from(["", "$", "\\$", "€"]))
    written = draw(st.sampled_from([minus + currency + digits, currency + minus + digits]))
    unit = draw(
        st.sampled_from(["", " dollars", "%", "\\%", " apples and 5 pears", "\\text{ cm}", ". Done", " (or so)"])
    )
    around = draw(st.sampled_from(["{}", "**{}**", "`{}`", "\\text{{{}}}", " {}", "*{}*"]))
    value = Fraction(f"{whole}{decimals.rstrip('.')}")
    return around.format(written + unit), -value if negative else value


@explore
@given(
    written_numbers(), WORDS, st.sampled_from(["#### {}", "\\boxed{{{}}}", "Final Answer: {}", "**Final Answer**\n{}"])
)
def test_a_marked_number_is_read_whatever_its_form_and_the_words_before(number, words, marker):
    written, value = number
    text = f"{words}\n{marker.format(written)}"
    assert extract_answer(text) == value and has_marked_answer(text)


@explore
@given(
    written_numbers(), written_numbers(), st.sampled_from(["#### {}", "\\boxed{{{}}}", "Final Answer: {}"]), st.data()
)
def test_of_two_markers_the_last_wins_until_the_turn_ends(first, second, marker, data):
    other = data.draw(st.sampled_from(["#### {}", "\\boxed{{{}}}", "Final Answer: {}"]))
    lines = [marker.format(first[0]), other.format(second[0])]
    assert extract_answer("\n".join(lines)) == second[1]
    end = data.draw(st.sampled_from(["<|im_end|>", "<|end|>", "</s>", "<|endoftext|>", "\n\nQuestion:", "<|eot_id|>"]))
    assert extract_answer(f"{lines[0]}{end}\n{lines[1]}") == first[1]


@explore
@given(
    written_numbers(), st.lists(st.integers(0, 99), max_size=4), st.sampled_from(["answer is {}", "Answer: {}", "{}"])
)
def test_without_a_marker_the_announced_number_or_the_last_one_counts(number, others, wording):
    written, value = number
    if wording == "{}":
        written = written.replace(" and 5 pears", "")
    text = f"{' and '.join(map(str, others))} so that {wording.format(written)}"
    assert extract_answer(text) == value and not has_marked_answer(text)


@explore
@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_fractions_are_exact(numerator, denominator):
    sign = "-" if numerator < 0 else ""
    for written in (f"{numerator}/{denominator}", f"{sign}\\frac{{{abs(numerator)}}}{{{denominator}}}"):
        assert extract_answer(f"#### {written}") == Fraction(numerator, denominator)


@explore
@given(st.text("0123456789#$\\{}[]()*-+./, \n%abfiox\u2212½", max_size=200) | st.text(max_size=200))
def test_any_text_is_read_without_an_error(text):
    number = extract_answer(text)
    assert number is None or isinstance(number, Fraction)
    assert end_of_turn(text) in text
    if has_marked_answer(text):
        assert any(character.isdigit() or character in "½" for character in text)


@pytest.mark.parametrize(
    "part",
    [
        "1", "[", "{", "}", "(", "#", "####\n", "#### Step 1\n", "#### 1. a\n", "\\boxed{", "\\frac{", "\\frac{1",
        "\\text{", "\\", "-", "-1", "1/", "1 ", "1,", ",123", "1.", ".", "½", "answer ", "the answer is 1 ", " ", "\n",
        "\n ", "<|", "<s>", "\nQuestion", "Final Answer:", "1 1/2 ", "a", "1{,}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("start", ["", "#### ", "\\boxed{", "-$", "Final Answer: 1,"])
def test_a_long_text_is_read_in_time(start, part):
    begun = time.process_time()
    extract_answer(start + part * (LONG // len(part)))
    # Linear: a tenth of a second. Quadratic: minutes.
    assert time.process_time() - begun < 20


@pytest.mark.parametrize(
    ("answer", "number"),
    [("5 + 3 = <<5+3=8>>8\n#### 8", 8), ("#### 2,880,000", 2880000), ("#### -10", -10), ("#### 0", 0), ("18", 18)],
)
def test_the_number_of_a_solution(answer, number):
    assert gold_answer(answer) == number


@pytest.mark.parametrize("answer", ["", "####", "5 + 3 = 8\n####", "#### none", "#### 5 or 6", "#### 5/0"])
def test_a_solution_without_one_number_is_refused(answer):
    with pytest.raises(ValueError, match="must end in one number, after `####`"):
        gold_answer(answer)

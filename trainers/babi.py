"""The bAbI stories: reading their text format, and generating new ones of two and three supporting facts.

The format (Weston et al. 2015, arXiv:1502.05698) numbers the lines of a story from 1; a question line adds the answer
and the numbers of the sentences that it follows from:

    1 Mary moved to the bathroom.
    2 Mary got the football there.
    3 Where is the football? <TAB>bathroom<TAB>2 1
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .splits import check_split, split_of

GENERATED_TASKS = ("babi2", "babi3")

PEOPLE = ("Mary", "Sandra", "John", "Daniel", "Bill", "Fred", "Jeff", "Julie")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office", "cellar", "garage")
OBJECTS = ("football", "milk", "apple", "book", "lamp", "key")
WORDING = {
    "move": (
        "moved to the {}.",
        "went to the {}.",
        "journeyed to the {}.",
        "travelled to the {}.",
        "went back to the {}.",
    ),
    "take": ("got the {} there.", "grabbed the {} there.", "took the {} there.", "picked up the {} there."),
    "drop": ("dropped the {}.", "discarded the {}.", "left the {} there.", "put down the {}."),
}

_FEWEST_FACTS = {"babi2": 2, "babi3": 3}
_ATTEMPTS = 5_000


@dataclass(frozen=True)
class BabiQuestion:
    """
    One question, with the part of its story that has been told when it is asked.

    Args:
        facts (`tuple[str, ...]`): The sentences before the question, questions left out.
        question (`str`): The question.
        answer (`str`): The answer; several are joined by commas, as in the original files.
        supporting (`tuple[int, ...]`): Indices into `facts` of the sentences that the answer follows from.
    """

    facts: tuple[str, ...]
    question: str
    answer: str
    supporting: tuple[int, ...]


class _Event(NamedTuple):
    person: str
    action: str  # "move", "take" or "drop"
    thing: str  # the place of a move, or the object


def format_question(question: BabiQuestion) -> tuple[str, str]:
    """The prompt and the answer of a question as text, the same for training and for evaluation."""
    return "\n".join((*question.facts, question.question)), f" {question.answer}"


def read_babi(path: str | Path) -> list[BabiQuestion]:
    """
    Read a file of any of the twenty tasks in the original format.

    Raises a `ValueError` that names the file and the line when a line is not of this format.
    """
    questions: list[BabiQuestion] = []
    facts: list[str] = []
    fact_of_line: dict[int, int] = {}
    number = 0
    with open(path, "rb") as file:
        for line_number, content in enumerate(file, start=1):
            # Shown as far as it can be read.
            line = content.decode("utf-8", "backslashreplace")
            try:
                content.decode("utf-8")
                head, _, content = line.rstrip("\n").partition(" ")
                if head not in ("1", str(number + 1)) or not content.strip():
                    raise ValueError(f"expected ID {number + 1} or 1, a space and a sentence")
                number = int(head)
                if number == 1:
                    facts, fact_of_line = [], {}
                if "\t" in content:
                    questions.append(_parse_question(content, facts, fact_of_line))
                else:
                    fact_of_line[number] = len(facts)
                    facts.append(content.strip())
            except ValueError as error:
                raise ValueError(f"{path}, line {line_number}: {error}, but got {line.rstrip()!r:.200}.") from None
    if not questions:
        raise ValueError(f"{path} holds no question: expected lines of 'ID question<TAB>answer<TAB>supporting IDs'.")
    return questions


def _parse_question(content: str, facts: list[str], fact_of_line: dict[int, int]) -> BabiQuestion:
    fields = [field.strip() for field in content.split("\t")]
    if len(fields) != 3 or not all(fields):
        raise ValueError("expected 'ID question<TAB>answer<TAB>supporting IDs'")
    question, answer, lines = fields
    unknown = [line for line in lines.split() if not line.isdecimal() or int(line) not in fact_of_line]
    if unknown:
        raise ValueError(f"supporting ID {unknown[0]!r} is no earlier sentence of this story")
    return BabiQuestion(tuple(facts), question, answer, tuple(fact_of_line[int(line)] for line in lines.split()))


def split_stories(
    questions: Sequence[BabiQuestion], held_out_fraction: float
) -> tuple[list[BabiQuestion], list[BabiQuestion]]:
    """
    Hold out the last questions, cut between two stories.

    Returns:
        `tuple[list[BabiQuestion], list[BabiQuestion]]`: The questions to train on and those held out.
    """
    cut = min(round(len(questions) * (1.0 - held_out_fraction)), len(questions) - 1)
    while cut > 0 and _same_story(questions[cut - 1], questions[cut]):
        cut -= 1
    if cut == 0:
        raise ValueError(f"The {len(questions)} questions are of one story, so none can be held out.")
    return list(questions[:cut]), list(questions[cut:])


def _same_story(earlier: BabiQuestion, later: BabiQuestion) -> bool:
    return later.facts[: len(earlier.facts)] == earlier.facts


def rename_entities(questions: Sequence[BabiQuestion], num_renamings: int, seed: int = 0) -> list[BabiQuestion]:
    """
    Copies of questions in which the people, the places and the objects have changed names among themselves. A story
    keeps its truth, because the rules of this world are the same for all of them.

    Args:
        questions (`Sequence[BabiQuestion]`): The questions; names that do not occur in them are not used.
        num_renamings (`int`): Copies of each question.
        seed (`int`, *optional*, defaults to `0`): The same seed gives the same names on every machine.
    """
    words = {word for question in questions for text in (*question.facts, question.answer) for word in _words(text)}
    kinds = [[name for name in kind if name in words] for kind in (PEOPLE, PLACES, OBJECTS)]
    rng = random.Random(f"names {seed}")
    copies = []
    for question in questions:
        for _ in range(num_renamings):
            names = {old: new for kind in kinds for old, new in zip(kind, _shuffled(rng, kind), strict=True)}

            def rename(text: str, names: dict[str, str] = names) -> str:
                return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text)

            facts = tuple(map(rename, question.facts))
            copies.append(BabiQuestion(facts, rename(question.question), rename(question.answer), question.supporting))
    return copies


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _shuffled(rng: random.Random, items: Sequence[str]) -> list[str]:
    # Of all methods of Random, Python promises the same numbers in every version for random() alone.
    return sorted(items, key=lambda _: rng.random())


def generate_stories(
    task: str,
    num_questions: int,
    split: str = "train",
    seed: int = 0,
    *,
    min_facts: int = 2,
    max_facts: int = 6,
    num_people: int = 4,
    num_places: int = 6,
    num_objects: int = 3,
    num_wordings: int = 5,
    at_most: bool = False,
) -> list[BabiQuestion]:
    """
    Generate stories of people who move about, take objects and drop them, each with one question at its end.

    `babi2` asks where an object is, which takes two facts: who had it last, and where that person went. `babi3` asks
    where it was before it came to a place, which takes three: who carried it, that person's way into the place, and
    the way before.

    No story is in two splits: what happens in it decides its split (see [`~splits.split_of`]), and neither the wording
    nor the question does. Longer stories with more people, places and objects are harder.

    Args:
        task (`str`): `"babi2"` or `"babi3"`.
        num_questions (`int`): How many stories. In `"train"`, the short ones of a small world repeat; in the other
            splits none does.
        split (`str`, *optional*, defaults to `"train"`): `"train"`, `"validation"` or `"test"`.
        seed (`int`, *optional*, defaults to `0`): The same seed gives the same stories on every machine.
        min_facts (`int`, *optional*, defaults to `2`): Sentences in the shortest story; `babi3` needs three at least.
        max_facts (`int`, *optional*, defaults to `6`): Sentences in the longest story. All lengths are equally
            frequent, as long as the split has more stories of them.
        num_people (`int`, *optional*, defaults to `4`): People in the world, eight at most.
        num_places (`int`, *optional*, defaults to `6`): Places, two to eight.
        num_objects (`int`, *optional*, defaults to `3`): Objects, six at most.
        num_wordings (`int`, *optional*, defaults to `5`): Ways to say the same thing, five at most. One is learned in
            about half the steps.
        at_most (`bool`, *optional*, defaults to `False`): Returns all stories that are found where these are fewer.

    Returns:
        `list[BabiQuestion]`: `num_questions` questions.
    """
    check_split(split)
    if task not in GENERATED_TASKS:
        raise ValueError(f"task is {task!r}: choose one of {', '.join(GENERATED_TASKS)}.")
    _check_range("num_people", num_people, 1, len(PEOPLE))
    _check_range("num_places", num_places, 2, len(PLACES))
    _check_range("num_objects", num_objects, 1, len(OBJECTS))
    _check_range("num_wordings", num_wordings, 1, len(WORDING["move"]))
    min_facts = max(min_facts, _FEWEST_FACTS[task])
    if max_facts < min_facts:
        raise ValueError(f"max_facts is {max_facts}: a {task} story here has at least {min_facts} facts, so raise it.")

    rng = random.Random(f"{task} {split} {seed}")
    cast = PEOPLE[:num_people], PLACES[:num_places], OBJECTS[:num_objects]
    lengths = list(range(min_facts, max_facts + 1))
    questions: list[BabiQuestion] = []
    held_out: set[BabiQuestion] = set()
    while len(questions) < num_questions:
        if not lengths and questions and at_most:
            break
        if not lengths:
            raise ValueError(
                f"num_questions is {num_questions}: split {split!r} has only {len(questions)} {task} stories of at "
                f"most {max_facts} facts, {num_people} people, {num_places} places and {num_objects} objects, so "
                "raise these."
            )
        length = _pick(rng, lengths)
        attempts = (_attempt(task, split, rng, length, cast, num_wordings) for _ in range(_ATTEMPTS))
        question = next((question for question in attempts if question and question not in held_out), None)
        if question is None:
            lengths.remove(length)
            continue
        questions.append(question)
        if split != "train":
            held_out.add(question)
    return questions


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}: choose a number from {low} to {high}.")


def _pick(rng: random.Random, items: Sequence):
    # Of all methods of Random, Python promises the same numbers in every version for random() alone.
    return items[int(rng.random() * len(items))]


def _attempt(
    task: str, split: str, rng: random.Random, length: int, cast: tuple, num_wordings: int
) -> BabiQuestion | None:
    """One random story of `length` facts, or `None` if it has no question of `task` or belongs to another split."""
    events = _simulate(rng, length, *cast)
    ask = _where_is if task == "babi2" else _where_was
    askable = [asked for thing in cast[2] for asked in ask(events, thing)]
    if not askable or split_of("; ".join(map(" ".join, events))) != split:
        return None
    question, answer, supporting = _pick(rng, askable)
    wordings = (_pick(rng, WORDING[event.action][:num_wordings]).format(event.thing) for event in events)
    facts = tuple(f"{event.person} {wording}" for event, wording in zip(events, wordings, strict=True))
    return BabiQuestion(facts, question, answer, supporting)


def _simulate(rng: random.Random, length: int, people: tuple, places: tuple, objects: tuple) -> list[_Event]:
    """
    What happens in a story. A person takes only what lies where that person is known to be, and drops only what they
    carry; an object that nobody has touched yet may lie anywhere.
    """
    place_of: dict[str, str] = {}
    holder: dict[str, str] = {}
    lies_in: dict[str, str] = {}
    events: list[_Event] = []
    while len(events) < length:
        person = _pick(rng, people)
        here = place_of.get(person)
        handled = []
        if here:
            handled = [thing for thing in objects if thing not in holder and lies_in.get(thing, here) == here]
            handled += [thing for thing in objects if holder.get(thing) == person]
        if handled and rng.random() < 0.5:
            thing = _pick(rng, handled)
            if thing in holder:
                events.append(_Event(person, "drop", thing))
                lies_in[thing] = place_of[holder.pop(thing)]
            else:
                events.append(_Event(person, "take", thing))
                holder[thing] = person
        else:
            place_of[person] = _pick(rng, [place for place in places if place != here])
            events.append(_Event(person, "move", place_of[person]))
    return events


def _moves(events: list[_Event], person: str, end: int) -> list[int]:
    return [index for index in range(end) if events[index].person == person and events[index].action == "move"]


def _where_is(events: list[_Event], thing: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The question where `thing` is, its answer and supporting facts; nothing if nobody has touched it."""
    touched = [index for index, event in enumerate(events) if event.thing == thing]
    if touched:
        last = touched[-1]
        carried_on = events[last].action == "take"
        move = _moves(events, events[last].person, len(events) if carried_on else last)[-1]
        yield f"Where is the {thing}?", events[move].thing, (last, move)


def _where_was(events: list[_Event], thing: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every question where `thing` was before a place, with the answer and the supporting facts."""
    touched = [index for index, event in enumerate(events) if event.thing == thing]
    if not touched:
        return
    taken = [index for index in touched if events[index].action == "take"][-1]
    moves = _moves(events, events[taken].person, touched[-1] if touched[-1] > taken else len(events))
    # The original files follow the person who had the object last, even to places visited before it was taken. A place
    # that this person and the object entered once has the same answer whether one follows the person or the object.
    visits = [events[move].thing for move in moves]
    path = _path(events, thing)
    for before, move in itertools.pairwise(moves):
        place = events[move].thing
        if move > taken and visits.count(place) == 1 and path.count(place) == 1:
            yield f"Where was the {thing} before the {place}?", events[before].thing, (taken, move, before)


def _path(events: list[_Event], thing: str) -> list[str]:
    """The places that `thing` has been in, in order."""
    path: list[str] = []
    place_of: dict[str, str] = {}
    holder = None
    for event in events:
        if event.action == "move":
            place_of[event.person] = event.thing
        elif event.thing == thing:
            holder = event.person if event.action == "take" else None
        if holder and path[-1:] != [place_of[holder]]:
            path.append(place_of[holder])
    return path

"""bAbI: the files say what they say, generated stories follow from their facts, and no split knows another's."""

import hashlib
import os
import re
from pathlib import Path

import pytest

from mixturekit.trainers.babi import (
    GENERATED_TASKS,
    OBJECTS,
    PEOPLE,
    PLACES,
    BabiQuestion,
    format_question,
    generate_stories,
    read_babi,
    rename_entities,
    split_stories,
)
from mixturekit.trainers.splits import SPLITS, split_of

DATA = Path(os.environ.get("MIXTUREKIT_DATA", Path(__file__).parents[2] / "../shared/data")) / "babi"
REAL_FILES = {
    "babi2": DATA / "qa2_two-supporting-facts_train.txt",
    "babi3": DATA / "qa3_three-supporting-facts_train.txt",
}

MOVE = re.compile(r"(\w+) (?:moved|went|journeyed|travelled|went back) to the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:got|grabbed|took|picked up) the (\w+) there\.")
DROP = re.compile(r"(\w+) (?:dropped|discarded|left|put down) the (\w+)(?: there)?\.")


def solve(facts, question):
    """
    Answer from the text alone; `None` where it does not say. Returns the answer that the object's own way gives, and
    the one by the way of the person who had it last, up to the drop. The original files of task 3 go by the latter,
    and often ask for a place that the person was in before taking the object.
    """
    *_, thing = re.search(r"(the|before the) (\w+)", question).groups()
    before = re.search(r"before the (\w+)", question)
    way, person_way, last_way, holder = [], {}, [], None
    for fact in facts:
        if move := MOVE.fullmatch(fact):
            person_way.setdefault(move[1], []).append(move[2])
        elif (take := TAKE.fullmatch(fact)) and take[2] == thing:
            holder = take[1]
        elif (drop := DROP.fullmatch(fact)) and drop[2] == thing:
            holder = None
            last_way = list(person_way.get(drop[1], [None]))
            way.append(last_way[-1])
        if holder:
            last_way = person_way.get(holder, [None])
            way.append(last_way[-1])
    if not before:
        return (way[-1] if way else None,) * 2
    return place_before(before[1], way), place_before(before[1], last_way)


def place_before(place, way):
    way = [here for index, here in enumerate(way) if index == 0 or here != way[index - 1]]
    arrivals = [index for index, here in enumerate(way) if here == place and index]
    return way[arrivals[-1] - 1] if arrivals else None


@pytest.fixture(params=GENERATED_TASKS)
def task(request):
    return request.param


@pytest.fixture
def real_file(task):
    if not REAL_FILES[task].exists():
        pytest.skip(f"the bAbI files are not in {DATA}; set MIXTUREKIT_DATA")
    return REAL_FILES[task]


def test_reads_the_original_files(real_file):
    questions = read_babi(real_file)
    assert len(questions) == 10_000
    for question in questions:
        _, answer = solve(question.facts, question.question)
        assert question.answer == answer
        assert question.question.endswith("?")
        assert all(0 <= index < len(question.facts) for index in question.supporting)


def test_nothing_of_the_original_files_is_lost_in_reading(real_file, tmp_path, write_babi):
    write_babi(read_babi(real_file), tmp_path / "copy.txt")
    assert (tmp_path / "copy.txt").read_bytes() == real_file.read_bytes()


def test_reads_facts_and_supporting_indices_around_earlier_questions(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(
        "1 Mary moved to the attic.\n"
        "2 Where is Mary? \tattic\t1\n"
        "3 Mary took the key there.\n"
        "4 What does Mary have? \tkey,attic\t3 1\n"
        "1 John went home.\n"
        "2 Where is John?\thome\t1\n"
    )
    assert read_babi(path) == [
        BabiQuestion(("Mary moved to the attic.",), "Where is Mary?", "attic", (0,)),
        BabiQuestion(
            ("Mary moved to the attic.", "Mary took the key there."), "What does Mary have?", "key,attic", (1, 0)
        ),
        BabiQuestion(("John went home.",), "Where is John?", "home", (0,)),
    ]


@pytest.mark.parametrize(
    ("lines", "bad_line", "reason"),
    [
        ("Mary moved to the attic.\n", 1, "expected ID 1"),
        ("2 Mary moved to the attic.\n", 1, "expected ID 1"),
        ("1 Mary moved.\n3 Mary slept.\n", 2, "expected ID 2 or 1"),
        ("1 Mary moved.\n2\n", 2, "a sentence"),
        ("1 Mary moved.\n\n2 Mary slept.\n", 2, "expected ID 2"),
        ("1 Mary moved.\n2 Where is Mary?\tattic\n", 2, "supporting IDs"),
        ("1 Mary moved.\n2 Where is Mary?\t\t1\n", 2, "supporting IDs"),
        ("1 Mary moved.\n2 Where is Mary?\tattic\tone\n", 2, "supporting ID 'one'"),
        ("1 Mary moved.\n2 Where is Mary?\tattic\t1 3\n3 Mary slept.\n", 2, "supporting ID '3'"),
        ("1 Mary moved.\n2 Where is Mary?\tattic\t1\n3 Why?\tattic\t2\n", 3, "supporting ID '2'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, lines, bad_line, reason):
    path = tmp_path / "broken.txt"
    path.write_text(lines)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line {bad_line}: .*{re.escape(reason)}"):
        read_babi(path)


def test_a_file_without_questions_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("1 Mary moved to the attic.\n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no question"):
        read_babi(tmp_path / "empty.txt")


@pytest.mark.parametrize("options", [{}, {"min_facts": 10, "max_facts": 30, "num_people": 8, "num_objects": 6}])
def test_a_generated_answer_follows_from_all_of_its_facts_and_needs_every_supporting_one(task, options):
    for question in generate_stories(task, 300, seed=1, **options):
        assert solve(question.facts, question.question) == (question.answer, question.answer)
        assert len(question.supporting) == len(set(question.supporting)) == {"babi2": 2, "babi3": 3}[task]
        supporting = [question.facts[index] for index in sorted(question.supporting)]
        assert solve(supporting, question.question)[0] == question.answer
        for left_out in range(len(supporting)):
            rest = supporting[:left_out] + supporting[left_out + 1 :]
            assert solve(rest, question.question)[0] is None


def test_generated_people_do_only_what_they_can(task):
    for question in generate_stories(task, 300, min_facts=10, max_facts=20):
        place_of, holder, lies_in = {}, {}, {}
        for fact in question.facts:
            if move := MOVE.fullmatch(fact):
                assert place_of.get(move[1]) != move[2]
                place_of[move[1]] = move[2]
            elif take := TAKE.fullmatch(fact):
                assert take[2] not in holder
                assert lies_in.get(take[2], place_of[take[1]]) == place_of[take[1]]
                holder[take[2]] = take[1]
            else:
                drop = DROP.fullmatch(fact)
                assert holder.pop(drop[2]) == drop[1]
                lies_in[drop[2]] = place_of[drop[1]]


def events(question):
    """What happens in a story, whatever the words."""
    kinds = {"move": MOVE, "take": TAKE, "drop": DROP}
    found = [(kind, pattern.fullmatch(fact)) for fact in question.facts for kind, pattern in kinds.items()]
    return tuple((kind, *match.groups()) for kind, match in found if match)


def test_splits_share_no_story_whatever_the_seed_the_task_and_the_words():
    stories = {
        split: {
            events(question)
            for task in GENERATED_TASKS
            for seed in (0, 1)
            for question in generate_stories(task, 150, split, seed)
        }
        for split in SPLITS
    }
    assert not stories["train"] & stories["validation"]
    assert not stories["train"] & stories["test"]
    assert not stories["validation"] & stories["test"]


def test_no_held_out_question_counts_twice(task):
    small = {"max_facts": 4, "num_people": 2, "num_places": 4, "num_objects": 2, "num_wordings": 1}
    for split in ("validation", "test"):
        assert len(set(generate_stories(task, 40, split, **small))) == 40


def test_of_few_stories_all_are_told_where_fewer_will_do():
    small = {"max_facts": 3, "num_people": 1, "num_places": 3, "num_objects": 1, "num_wordings": 1}
    with pytest.raises(
        ValueError, match="num_questions is 100: split 'test' has only [0-9]+ babi2 stories"
    ) as refusal:
        generate_stories("babi2", 100, "test", **small)
    known = int(re.search(r"only (\d+)", str(refusal.value))[1])
    told = generate_stories("babi2", 100, "test", at_most=True, **small)
    assert 0 < known == len(told) == len(set(told)) < 100
    assert told == generate_stories("babi2", known, "test", **small)


def test_a_key_is_in_one_split_and_eight_of_ten_are_in_train():
    counts = {split: sum(split_of(f"key {index}") == split for index in range(5_000)) for split in SPLITS}
    assert sum(counts.values()) == 5_000
    assert counts["train"] == pytest.approx(4_000, abs=150)
    assert counts["validation"] == pytest.approx(500, abs=100)


def test_generation_is_the_same_everywhere(task):
    text = repr(
        [format_question(question) for split in SPLITS for question in generate_stories(task, 20, split, seed=3)]
    )
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert digest == {"babi2": "2d9326801bf85454", "babi3": "76b24f2d50b810d2"}[task]


def test_another_seed_tells_other_stories(task):
    assert generate_stories(task, 50, seed=0) == generate_stories(task, 50, seed=0)
    assert generate_stories(task, 50, seed=0) != generate_stories(task, 50, seed=1)


def test_stories_are_as_long_and_as_rich_as_asked(task):
    questions = generate_stories(task, 200, min_facts=3, max_facts=5, num_people=2, num_places=3, num_objects=1)
    assert {len(question.facts) for question in questions} == {3, 4, 5}
    assert {event[1] for question in questions for event in events(question)} == {"Mary", "Sandra"}
    assert len({question.answer for question in questions}) == 3
    shortest = {len(question.facts) for question in generate_stories(task, 200)}
    assert shortest == set(range({"babi2": 2, "babi3": 3}[task], 7))


def test_one_wording_says_everything_in_one_way(task):
    facts = {fact for question in generate_stories(task, 200, max_facts=10, num_wordings=1) for fact in question.facts}
    words = {re.sub(r"^\w+ | \w+( there)?\.$", "", fact) for fact in facts}
    assert words == {"moved to the", "got the", "dropped the"}


def test_generated_stories_survive_the_file_format(task, tmp_path, write_babi):
    questions = generate_stories(task, 100)
    write_babi(questions, tmp_path / "stories.txt")
    assert read_babi(tmp_path / "stories.txt") == questions


def test_the_prompt_is_the_facts_and_the_question():
    question = BabiQuestion(("Mary moved to the attic.", "Mary slept."), "Where is Mary?", "attic", (0,))
    assert format_question(question) == ("Mary moved to the attic.\nMary slept.\nWhere is Mary?", " attic")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"task": "babi4"}, "task is 'babi4': choose one of babi2, babi3"),
        ({"split": "dev"}, "split is 'dev': choose one of train, validation, test"),
        ({"num_people": 9}, "num_people is 9: choose a number from 1 to 8"),
        ({"num_places": 1}, "num_places is 1: choose a number from 2 to 8"),
        ({"num_objects": 0}, "num_objects is 0: choose a number from 1 to 6"),
        ({"num_wordings": 6}, "num_wordings is 6: choose a number from 1 to 5"),
        ({"max_facts": 2}, "max_facts is 2: a babi3 story here has at least 3 facts"),
        (
            {"max_facts": 3, "num_people": 1, "num_places": 2, "num_objects": 1, "split": "test"},
            "num_questions is 1: split 'test' has only 0 babi3 stories of at most 3 facts, 1 people, 2 places and 1 ",
        ),
    ],
)
def test_bad_options_are_refused_with_one_clear_sentence(options, reason):
    with pytest.raises(ValueError, match=reason):
        # No question at all is none to be content with.
        generate_stories(**{"task": "babi3", "num_questions": 1, "at_most": True, **options})


def last_place(question):
    """Where the object of a two-fact question is: where who had it last was when it was dropped, or is by now."""
    thing = question.question.rstrip("?").rpartition(" ")[2]
    place, holder, answer = {}, None, None
    for fact in question.facts:
        words = fact.rstrip(".").removesuffix(" there").split()
        if words[-1] in PLACES:
            place[words[0]] = words[-1]
        elif words[-1] == thing:
            holder = None if words[1] in ("dropped", "discarded", "left", "put") else words[0]
            answer = place[words[0]]
        if holder:
            answer = place[holder]
    return answer


def test_a_story_with_other_names_is_as_true():
    questions = generate_stories("babi2", 60, max_facts=12)
    renamed = rename_entities(questions, 3)
    assert len(renamed) == 180
    assert all(last_place(question) == question.answer for question in questions + renamed)
    assert sum(copy.facts != question.facts for question in questions for copy in renamed) > 0
    for number, copy in enumerate(renamed):
        assert copy.supporting == questions[number // 3].supporting


def test_names_are_swapped_among_those_that_occur():
    questions = generate_stories("babi3", 40, num_people=2, num_places=4, num_objects=2)
    names = {word for kind in (PEOPLE[2:], PLACES[4:], OBJECTS[2:]) for word in kind}
    renamed = rename_entities(questions, 5, seed=1)
    used = {word for copy in renamed for text in (*copy.facts, copy.question) for word in re.findall(r"\w+", text)}
    assert not names & used
    assert renamed == rename_entities(questions, 5, seed=1)
    assert renamed != rename_entities(questions, 5, seed=2)


def test_questions_of_one_story_cannot_be_split():
    (question,) = generate_stories("babi2", 1)
    longer = BabiQuestion((*question.facts, "Mary went to the office."), question.question, "office", (0, 1))
    with pytest.raises(ValueError, match="The 2 questions are of one story"):
        split_stories([question, longer], 0.1)

"""Arguments of a recipe: a file, options that win over it, and lists that may be given in parts."""

from dataclasses import dataclass, field

import pytest

from mixturekit.trainers.recipe_parser import RepeatableOption, parse_recipe


@dataclass
class Arguments:
    name: str
    task: list[str] = field(default_factory=lambda: ["story"], metadata={"action": RepeatableOption})
    steps: int = 3


def parse(line, **options):
    return parse_recipe((Arguments,), line.split(), **options)[0]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: from-file\ntask: [sum, story]\nsteps: 5\n")
    return path


def test_a_list_may_be_given_in_parts_or_at_once():
    assert parse("--name a --task x --task y z").task == parse("--name a --task x y z").task == ["x", "y", "z"]


def test_what_is_given_replaces_the_list_of_the_file_and_of_the_default(config):
    assert parse("--name a --task x").task == ["x"]
    assert parse(f"--config {config} --task x --task y").task == ["x", "y"]
    assert parse(f"--config {config}").task == ["sum", "story"]
    assert parse("--name a").task == ["story"]


def test_a_second_parse_does_not_remember_the_first():
    assert parse("--name a --task x").task == parse("--name a --task x").task


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(config):
    defaults = {"name": "default", "steps": 9}
    assert parse("", defaults=defaults) == Arguments("default", ["story"], 9)
    assert parse(f"--config {config}", defaults=defaults).steps == 5
    assert parse(f"--config {config} --steps 7", defaults=defaults).steps == 7


def test_what_the_file_has_need_not_be_on_the_command_line(config, capsys):
    assert parse(f"--config {config}").name == "from-file"
    with pytest.raises(SystemExit):
        parse("--steps 2")
    assert "--name" in capsys.readouterr().err


def test_an_unknown_key_of_the_file_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\nstep: 5\n")
    with pytest.raises(ValueError, match=f"{path} has unknown options: step"):
        parse(f"--config {path}")

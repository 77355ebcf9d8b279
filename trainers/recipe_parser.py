"""Arguments of a recipe: a YAML file, and options that override it."""

import argparse
import sys
from collections.abc import Mapping, Sequence

import yaml
from transformers import HfArgumentParser


class RepeatableOption(argparse.Action):
    """
    A list option that may be given several times: `--task babi2 --task arithmetic` is `--task babi2 arithmetic`. Give
    it as `"action"` in the metadata of a field; unlike argparse's `extend`, what is given replaces the default.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        """Collects the values of one more occurrence."""
        given = vars(namespace).setdefault("_given", {})
        given.setdefault(self.dest, []).extend(values)
        setattr(namespace, self.dest, given[self.dest])


def parse_recipe(
    dataclass_types: Sequence[type],
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Mapping | None = None,
) -> tuple:
    """Fills the dataclasses from `--config FILE` and the options after it, which win.

    Args:
        dataclass_types (`Sequence[type]`): Dataclasses, as for `HfArgumentParser`.
        arguments (`Sequence[str]`, *optional*): The command line; that of the process if unset.
        description (`str`, *optional*): Text of `--help`.
        defaults (`Mapping`, *optional*): Values that replace the defaults of the dataclasses.

    Returns:
        One instance of each dataclass.

    Raises:
        ValueError: If the file has a key that no dataclass has.
        FileNotFoundError: If there is no such file.
    """
    parser = HfArgumentParser(dataclass_types, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options.")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    path = _config_path(arguments)
    values = dict(defaults or {}) | ({} if path is None else _read_config(path, parser))
    parser.set_defaults(**values)
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    *instances, namespace = parser.parse_args_into_dataclasses(arguments)
    return tuple(instances)


def _read_config(path: str, parser: HfArgumentParser) -> dict:
    with open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a list of `option: value` lines.")
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path} has unknown options: {', '.join(unknown)}.")
    return values


def _config_path(arguments: list[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None

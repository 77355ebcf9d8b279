"""Arguments of a recipe: a YAML file, and options that override it."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool


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
        ValueError: If the file is no YAML, or has a key that no dataclass has, or a value of another type.
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
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    # Besides what YAML does not allow: text that is not UTF-8, dates that are none, and brackets without end.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a list of `option: value` lines.")
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(" ".join(str(name).split()) for name in values if name not in actions)
    if unknown:
        raise ValueError(f"{path} has unknown options: {', '.join(unknown)}.")
    # The command line takes one text for what may be several, such as `report_to`.
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    texts = {name for name, hint in hints.items() if "list[str]" in str(hint)}
    return {name: _converted(value, actions[name], path, name in texts) for name, value in values.items()}


def _converted(value: object, action: argparse.Action, path: str, may_be_list: bool) -> object:
    """A value of a file as the command line would give it, whose options are all text."""
    try:
        if isinstance(action.nargs, str) and action.nargs in "+*" or may_be_list and isinstance(value, list):
            return [_convert(item, action) for item in (value if isinstance(value, list) else [value])]
        return _convert(value, action)
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        kind = getattr(action.type, "__name__", "value").replace("string_to_bool", "yes or no")
        raise ValueError(f"{path}: {action.dest} is {value!r:.100}, which is no {kind}.") from None


def _convert(value: object, action: argparse.Action) -> object:
    of_scalars = action.type in (int, float, str, string_to_bool)
    if value is None and action.default is None or not of_scalars and isinstance(value, list | dict):
        return value
    if value is None or isinstance(value, list | dict):
        raise TypeError
    # Not by way of text, in which a large number has no end.
    if isinstance(value, int | float) and not isinstance(value, bool) and action.type in (int, float):
        converted = action.type(value)
        if converted != value and value == value:
            raise ValueError
        return converted
    return value if action.type is None else action.type(str(value))


def _config_path(arguments: list[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None

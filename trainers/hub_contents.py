"""The files of a repository, put together in a folder before anything is sent: weights, code, figures and card."""

import json
import re
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, RepoCard, eval_result_entries_to_yaml

from ..hub_cards.published_files import shareable, stage_files
from ..modeling import MopConfig, MoreConfig, TieredMoeConfig
from .agent_card import card_of_agent
from .card_figures import FOLDER
from .evaluation_report import update_model_card
from .hub_push_config import GENERATED, PushArguments
from .imitation_card import card_of_policy
from .language_modeling_card import card_of_language_model
from .shared_card import on_hub
from .training_record import load_training_record

CARD = "README.md"
EVALUATIONS = "evaluation"
_RESULTS = "eval_results.json"
_PICTURES = ("depth_sweep.png", "self_sufficiency.png", "routing.png")
# What evaluate_more.py adds to the card of a checkpoint.
_SECTION = re.compile(r"\n## Evaluation\n.*?(?=\n## |\Z)", re.DOTALL)


class Contents:
    """
    What goes to the Hub.

    Args:
        folder (`Path`): Where the files are put together.
        write_card (`Callable`): Writes the card; takes the revision to pin, or nothing.
        left (`list[str]`): Files that stay here.
    """

    def __init__(self, folder: Path, write_card: Callable[..., RepoCard], left: list[str]):
        self.folder, self.write_card, self.left = folder, write_card, left

    def files(self) -> dict[str, Path]:
        """The files by their names in the repository."""
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}


def gather_contents(arguments: PushArguments, folder: Path) -> Contents:
    """
    Puts the files together.

    Args:
        arguments ([`PushArguments`]): What to push.
        folder (`Path`): An empty folder.

    Raises:
        FileNotFoundError: If something that is needed is not there.
    """
    if arguments.demonstrations is not None:
        return _gather_demonstrations(arguments, folder)
    if arguments.completions is not None:
        return _gather_completions(arguments, folder)
    return _gather_model(arguments, folder)


def _gather_demonstrations(arguments: PushArguments, folder: Path) -> Contents:
    from .babyai_demonstrations import generate_demonstrations, load_demonstrations
    from .dataset_cards import demonstrations_card, stage_demonstrations

    if arguments.demonstrations == GENERATED:
        episodes = generate_demonstrations(arguments.env_id, arguments.num_demonstrations)
    else:
        episodes = load_demonstrations(arguments.demonstrations)
    stage_demonstrations(episodes, folder)

    def write_card(revision: str | None = None) -> RepoCard:
        card = demonstrations_card(episodes, arguments.repo_id, revision, arguments.license)
        card.save(folder / CARD)
        return card

    return Contents(folder, write_card, [])


def _gather_completions(arguments: PushArguments, folder: Path) -> Contents:
    from .dataset_cards import completions_card, load_completions, stage_completions

    solutions, report = load_completions(arguments.completions)
    stage_completions(solutions, folder)
    (folder / _RESULTS).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    def write_card(revision: str | None = None) -> RepoCard:
        card = completions_card(solutions, report, arguments.repo_id, revision, arguments.license)
        card.save(folder / CARD)
        return card

    return Contents(folder, write_card, [])


def _gather_model(arguments: PushArguments, folder: Path) -> Contents:
    source = Path(arguments.model_name_or_path)
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}.")
    record = load_training_record(source) | ({"license": arguments.license} if arguments.license else {})
    _, left = stage_files(source, folder)
    if (folder / "adapter_config.json").is_file():
        if arguments.merge_adapter:
            _merge_adapter(arguments, source, folder)
        elif arguments.base_model:
            _name_base(arguments.base_model, folder)
    elif arguments.merge_adapter:
        raise ValueError(f"{source} has no adapter to merge.")
    reports = _stage_evaluations(arguments, source, folder)
    before = ModelCard.load(source / CARD) if (source / CARD).is_file() else None
    (folder / CARD).unlink(missing_ok=True)

    def write_card(revision: str | None = None) -> RepoCard:
        card = _model_card(arguments, record, folder, reports, revision)
        card.save(folder / CARD)
        if record["system"] == "more":
            _add_evaluation(before, reports, folder)
        return ModelCard.load(folder / CARD)

    return Contents(folder, write_card, left)


def _model_card(
    arguments: PushArguments, record: dict, folder: Path, reports: list[tuple[str, dict]], revision: str | None
) -> ModelCard:
    name = arguments.repo_id
    if record["system"] == "more":
        return card_of_language_model(record, MoreConfig.from_pretrained(folder), folder, name, revision)
    if record["system"] == "mop":
        given = [report for _, report in reports]
        return card_of_policy(record, MopConfig.from_pretrained(folder), folder, name, revision, given)
    if record["system"] == "tiered_moe":
        return card_of_agent(record, TieredMoeConfig.from_pretrained(folder), folder, name, revision)
    if record["system"] == "ppo":
        from .ppo_card import card_of_ppo_policy

        base = arguments.base_model if on_hub(arguments.base_model) else record["data"].get("base_model")
        if (base or record["data"]["has_base"]) and not arguments.license:
            made_from = base or "another model"
            raise ValueError(f"The policy was made from {made_from}, whose licence decides: name it with --license.")
        return card_of_ppo_policy(record, folder, name, revision, reports, base)
    raise ValueError(f"The record in {arguments.model_name_or_path} is of {record['system']!r}, which has no card.")


def _stage_evaluations(arguments: PushArguments, source: Path, folder: Path) -> list[tuple[str, dict]]:
    """The reports of the run and of later evaluations, which go into the repository, and their pictures."""
    places = [(when, source / f"eval_{when}") for when in ("before", "after") if (source / f"eval_{when}").is_dir()]
    for given in arguments.evaluation:
        if not Path(given, _RESULTS).is_file():
            raise FileNotFoundError(f"{given} has no {_RESULTS}: the recipes evaluate_*.py write it.")
        places.append((Path(given).resolve().name, Path(given)))
    reports = []
    for when, place in places:
        report = shareable(json.loads((place / _RESULTS).read_text("utf-8")))
        reports.append((when, report))
        target = folder / EVALUATIONS / f"{when}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        for picture in (place / name for name in _PICTURES):
            if picture.is_file():
                (folder / FOLDER).mkdir(exist_ok=True)
                shutil.copyfile(picture, folder / FOLDER / picture.name)
        # Whoever sorts a leaderboard wants to know what was learned.
        if when != "before":
            _write_gsm8k_results(report, folder)
    return reports


def _write_gsm8k_results(report: dict, folder: Path) -> None:
    """For the leaderboard of the data set, if the problems were those of its split test, and all of them."""
    settings = report["settings"]
    name = settings.get("dataset_name")
    records = [row for row in report["results"] if row.get("grader") == "exact" and row["metric"] == "pass@1"]
    if not on_hub(name) or settings["split"] != "test" or settings["num_problems"] is not None or not records:
        return
    entries = [
        EvalResultEntry(
            dataset_id=name,
            task_id=name.split("/")[1],
            value=row["value"],
            date=date.today().isoformat(),
            notes=f"pass@1, {row['decoding']}, exact number, n = {row['count']}, mixturekit",
        )
        for row in records
    ]
    path = folder / ".eval_results" / f"{name.split('/')[1]}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


def _add_evaluation(before: ModelCard | None, reports: list[tuple[str, dict]], folder: Path) -> None:
    """The results of evaluate_more.py: those given now, or else those that are on the card of the run."""
    for _, report in reports:
        update_model_card(report, folder)
    if reports or before is None or not (section := _SECTION.search(before.text)):
        return
    card = ModelCard.load(folder / CARD)
    card.text = card.text.rstrip() + "\n" + section[0].rstrip() + "\n"
    measured = [entry for entry in before.data.eval_results or [] if (entry.dataset_args or {}).get("evaluated_by")]
    card.data.model_name = card.data.model_name or Path(folder).name
    card.data.eval_results = [*(card.data.eval_results or []), *measured]
    card.save(folder / CARD)


def _name_base(base_model: str, folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": base_model}, indent=2) + "\n", encoding="utf-8")


def _merge_adapter(arguments: PushArguments, source: Path, folder: Path) -> None:
    from peft import PeftModel

    from .expert_adapters import load_causal_lm

    base = arguments.base_model or json.loads((source / "adapter_config.json").read_text("utf-8")).get(
        "base_model_name_or_path"
    )
    if not base or not (Path(base).is_dir() or on_hub(base)):
        raise FileNotFoundError(f"The base of {source} is {base!r}, which is not there: name it with --base_model.")
    merged = PeftModel.from_pretrained(load_causal_lm(base), str(source)).merge_and_unload()
    for path in [*folder.glob("adapter_*")]:
        path.unlink()
    merged.save_pretrained(folder)

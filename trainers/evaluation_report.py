"""The results of an evaluation as a table, a picture, and entries of the model card."""

import math
import re
from collections import defaultdict
from datetime import date
from pathlib import Path

import matplotlib
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from rich.table import Table

from .task_data import BABI_TASKS, GENERATED
from .wide_console import wide_console

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402, the backend that needs no screen comes first

PICTURE = "depth_sweep.png"

_HEADING = "## Evaluation"
# Tells the entries of the model-index that the next evaluation replaces from those of others.
_OURS = {"evaluated_by": "mixturekit"}
_SHARES = ("generation_accuracy", "ranking_accuracy", "exact_match")
_TITLES = {
    "perplexity": "perplexity per token",
    "word_perplexity": "perplexity per word",
    "bits_per_byte": "bits per byte",
    "exact_match": "exact match",
}


def count_of(number: int, noun: str) -> str:
    """`1 digit`, `2 digits`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def series(results: list[dict]) -> dict[tuple, dict[int | None, dict]]:
    """The records by what they measure, `(task, digits, metric)`, and then by number of recurrences."""
    grouped: dict[tuple, dict[int | None, dict]] = defaultdict(dict)
    for record in results:
        grouped[record["task"], record.get("digits"), record["metric"]][record["num_recurrences"]] = record
    return dict(grouped)


def print_results(results: list[dict]) -> None:
    """Prints a table with a row for each figure and a column for each number of recurrences."""
    depths = list(dict.fromkeys(record["num_recurrences"] for record in results))
    table = Table(title="Results; shares in %, with 95 % interval")
    for column in ("task", "figure", "n"):
        table.add_column(column)
    for depth in depths:
        table.add_column("value" if depth is None else count_of(depth, "recurrence"), justify="right")
    for (task, digits, metric), by_depth in series(results).items():
        first = next(iter(by_depth.values()))
        longer = "" if first.get("in_range", True) else ", longer than trained"
        name = task if digits is None else f"{task}, {count_of(digits, 'digit')}{longer}"
        cells = [_cell(by_depth[depth]) if depth in by_depth else "-" for depth in depths]
        table.add_row(name, _title(metric), f"{first['count']:,}", *cells)
    wide_console().print(table)


def _title(metric: str) -> str:
    return _TITLES.get(metric, metric.replace("_", " "))


def _cell(record: dict) -> str:
    if record["metric"] in _SHARES:
        low, high = 100 * record["low"], 100 * record["high"]
        return f"{100 * record['value']:.1f} ({low:.1f} to {high:.1f})"
    return f"{record['value']:.4g}"


def draw_results(results: list[dict], path: str | Path) -> None:
    """Draws each score against the number of recurrences, and perplexity by position, as a PNG file."""
    panels: dict[str, list[tuple[str, dict]]] = defaultdict(list)
    positions: dict[int | None, list[dict]] = defaultdict(list)
    for (task, digits, metric), by_depth in series(results).items():
        if any("position" in record for record in by_depth.values()):
            for depth, record in by_depth.items():
                positions[depth].append(record)
        elif digits is not None:
            longer = "" if next(iter(by_depth.values()))["in_range"] else ", longer than trained"
            panels[f"{task}: exact match"].append((f"{count_of(digits, 'digit')}{longer}", by_depth))
        elif metric in _SHARES:
            panels[f"{task}: accuracy"].append((_title(metric).removesuffix(" accuracy"), by_depth))
        elif metric != "words":
            panels[_title(metric)].append(("", by_depth))
    count = len(panels) + bool(positions)
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.4 * rows), squeeze=False)
    flat = list(axes.flat)
    for axis, (title, lines) in zip(flat, panels.items(), strict=False):
        _draw_panel(axis, title, lines)
    if positions:
        _draw_positions(flat[len(panels)], positions)
    for axis in flat[count:]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_panel(axis, title: str, lines: list[tuple[str, dict]]) -> None:
    for label, by_depth in lines:
        steps = [depth or 1 for depth in by_depth]
        values = [record["value"] for record in by_depth.values()]
        line = axis.plot(steps, values, marker="o", label=label)[0]
        if all("low" in record for record in by_depth.values()):
            bounds = [[record[bound] for record in by_depth.values()] for bound in ("low", "high")]
            axis.vlines(steps, *bounds, color=line.get_color(), alpha=0.4)
            axis.set_ylim(-0.03, 1.03)
    depths = sorted({depth for _, by_depth in lines for depth in by_depth if depth is not None})
    axis.set_xscale("log", base=2)
    axis.set_xticks(depths or [1], [str(depth) for depth in depths] or ["not recurrent"])
    axis.minorticks_off()
    axis.set_xlabel("recurrences" if depths else "")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    if any(label for label, _ in lines):
        axis.legend(fontsize="small")


def _draw_positions(axis, positions: dict[int | None, list[dict]]) -> None:
    trained = 0
    for depth, records in positions.items():
        places, values = [record["position"] for record in records], [record["value"] for record in records]
        axis.plot(places, values, marker=".", label="" if depth is None else count_of(depth, "recurrence"))
        trained = max((record["position"] for record in records if record["in_range"]), default=0)
    axis.axvline(trained, color="grey", linestyle="--")
    axis.set_xlabel("position in the sequence (dashed: training length)")
    axis.set_title("perplexity by position")
    axis.grid(alpha=0.3)
    if None not in positions:
        axis.legend(fontsize="small")


def update_model_card(report: dict, folder: str | Path) -> list[Path]:
    """
    Adds the results to the card of a checkpoint, as `model-index` and as a table, and to `.eval_results/`, where the
    Hub looks for results on its own data sets. What an earlier evaluation wrote there is replaced.

    Args:
        report (`dict`): What `eval_results.json` has.
        folder (`str` or `Path`): The checkpoint, with a `README.md`.

    Returns:
        `list[Path]`: The files that were written.
    """
    path = Path(folder, "README.md")
    if not path.is_file():
        raise FileNotFoundError(f"There is no model card {path} to add the results to.")
    card = ModelCard.load(path)
    records = [record for record in report["results"] if "position" not in record and record["metric"] != "words"]
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    others = [entry for entry in card.data.eval_results or [] if entry.dataset_args != _OURS]
    card.data.eval_results = others + [_index_entry(record, report) for record in records]
    card.text = _without_section(card.text) + _section(records, report)
    card.save(path)
    entries = [entry for record in records if (entry := _hub_entry(record, report))]
    results = Path(folder, ".eval_results", "mixturekit.yaml")
    if not entries:
        results.unlink(missing_ok=True)
        return [path]
    results.parent.mkdir(exist_ok=True)
    results.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    return [path, results]


def _source(record: dict, report: dict) -> tuple[str, str]:
    """What the Hub calls the data of a record, and its name for people."""
    if record["task"] == "generation":
        return "local", "prompts"
    if record["task"] == "perplexity":
        name = report["settings"]["dataset_name"]
    elif record["task"] in BABI_TASKS and report["tasks"]["babi_data"] != GENERATED:
        name = report["tasks"]["babi_data"]
    else:
        return "generated", "generated stories" if record["task"] in BABI_TASKS else "generated sums"
    is_local = Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    return ("local", Path(name).name) if is_local else (name, name)


def _index_entry(record: dict, report: dict) -> EvalResult:
    kind, name = _source(record, report)
    details = [] if record.get("digits") is None else [count_of(record["digits"], "digit")]
    if record["num_recurrences"] is not None:
        details.append(count_of(record["num_recurrences"], "recurrence"))
    return EvalResult(
        task_type="text-generation",
        dataset_type=kind,
        dataset_name=name,
        dataset_config=record["task"],
        dataset_args=_OURS,
        metric_type=record["metric"],
        metric_name=", ".join([_title(record["metric"]), *details]),
        metric_value=round(record["value"], 5),
    )


def _hub_entry(record: dict, report: dict) -> EvalResultEntry | None:
    kind, _ = _source(record, report)
    if "/" not in kind:
        return None
    depth = "" if record["num_recurrences"] is None else f", {count_of(record['num_recurrences'], 'recurrence')}"
    return EvalResultEntry(
        dataset_id=kind,
        task_id=record["task"],
        value=record["value"],
        date=date.today().isoformat(),
        notes=f"{_title(record['metric'])}{depth}, n = {record['count']}, mixturekit",
    )


def _section(records: list[dict], report: dict) -> str:
    depths = list(dict.fromkeys(record["num_recurrences"] for record in records))
    heads = ["value" if depth is None else count_of(depth, "recurrence") for depth in depths]
    lines = [f"| task | figure | n | {' | '.join(heads)} |", f"| --- | --- | --- |{' --- |' * len(depths)}"]
    for (task, digits, metric), by_depth in series(records).items():
        first = next(iter(by_depth.values()))
        name = task if digits is None else f"{task}, {count_of(digits, 'digit')}"
        cells = " | ".join(_cell(by_depth[depth]) if depth in by_depth else "-" for depth in depths)
        lines.append(f"| {name} | {_title(metric)} | {first['count']} | {cells} |")
    note = (
        f"By `recipes/evaluate_more.py`, seed {report['settings']['seed']}, on {report['hardware']}. Shares are in %, "
        "with 95 % intervals."
    )
    return "\n".join([f"\n{_HEADING}\n", f"{note}\n", *lines, ""])


def _without_section(text: str) -> str:
    """The card's text without an earlier evaluation, which ends at the next heading of the same level."""
    return re.sub(rf"\n{_HEADING}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL).rstrip() + "\n"

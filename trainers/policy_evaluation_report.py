"""The results of an evaluation of policies as a table and as a picture."""

from collections import defaultdict
from pathlib import Path

import matplotlib
from rich.table import Table

from .policy_evaluation import describe
from .wide_console import wide_console

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402, the backend that needs no screen comes first

PICTURE = "self_sufficiency.png"


def print_results(results: list[dict]) -> None:
    """Prints a row for each level and way to play."""
    table = Table(title="Results; success in %, with 95 % interval; length over the bot's on the same seeds")
    for column in ("level", "played"):
        table.add_column(column)
    for column in ("episodes", "success", "return", "score", "length", "over bot", "routing cost"):
        table.add_column(column, justify="right")
    for record in results:
        low, high = 100 * record["success_low"], 100 * record["success_high"]
        table.add_row(
            record["level"],
            describe(record),
            f"{record['episodes']:,}",
            f"{100 * record['success']:.1f} ({low:.1f} to {high:.1f})",
            _number(record["return"]),
            _number(record["normalised_score"]),
            f"{record['length']:.1f}",
            _number(record["length_ratio"]),
            _number(record["routing_cost"]),
        )
    wide_console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw_curves(results: list[dict], path: str | Path) -> bool:
    """
    Draws success against the threshold below which experts are dropped, and success without the largest expert of
    each layer as a dashed line, as a PNG file.

    Returns:
        Whether there was something to draw.
    """
    curves: dict[str, list[dict]] = defaultdict(list)
    lesions: dict[str, dict] = {}
    for record in results:
        if record["lesion_largest"]:
            lesions[record["level"]] = record
        elif record["weight_threshold"] is not None:
            curves[record["level"]].append(record)
    if not curves and not lesions:
        return False
    figure, axis = pyplot.subplots(figsize=(6.4, 4.2))
    for number, level in enumerate(dict.fromkeys([*curves, *lesions])):
        colour, name = f"C{number % 10}", level.removeprefix("BabyAI-").removesuffix("-v0")
        records = sorted(curves[level], key=lambda record: record["weight_threshold"])
        if records:
            thresholds = [record["weight_threshold"] for record in records]
            axis.plot(thresholds, [record["success"] for record in records], marker="o", color=colour, label=name)
            bounds = [[record[bound] for record in records] for bound in ("success_low", "success_high")]
            axis.fill_between(thresholds, *bounds, color=colour, alpha=0.15, linewidth=0)
        if level in lesions:
            label = f"{name}, largest experts removed"
            axis.axhline(lesions[level]["success"], color=colour, linestyle="--", label=label)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("weight below which experts are dropped")
    axis.set_ylabel("success")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True

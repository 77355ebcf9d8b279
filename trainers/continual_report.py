"""One HTML page on a run over several games: what was kept, where the experts were, and which game uses which."""

import json
from pathlib import Path

import numpy as np

from .continual_log import METRICS, read_lines
from .continual_results import RESULTS
from .report_page import LAYOUT, PALETTE, SCALE, plot, section, table, write_page

_COLOURS = [f"#{colour}" for colour in PALETTE.split()]
_LINES = LAYOUT | {
    "height": 300, "margin": {"l": 60, "r": 10, "t": 10, "b": 50}, "xaxis": {"title": {"text": "step"}}
}  # fmt: skip
_RATES = {
    "store/acting/hit_rate": "acting, fast tier",
    "store/updating/hit_rate": "updating, fast tier",
}


def write_continual_report(run: str | Path, path: str | Path) -> None:
    """
    Writes the page of a run.

    Args:
        run (`str` or `Path`): Folder of the run.
        path (`str` or `Path`): Of the page.

    Raises:
        FileNotFoundError: If the run has not been trained by `train_atari.py`.
    """
    run = Path(run)
    if not (run / RESULTS).is_file():
        raise FileNotFoundError(f"{run} has no {RESULTS}: train_atari.py writes it.")
    results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    lines = [line for line in read_lines(run / METRICS) if "game" in line] if (run / METRICS).is_file() else []
    parts = [_retention(results), _learning(lines), *_store(lines, results), *_experts(results)]
    facts = [
        " → ".join("+".join(phase) for phase in results["phases"]),
        f"{results['steps']:,} steps",
        f"{results['parameters']['total']:,} parameters",
        f"{results['parameters']['active']:,} active",
        results["hardware"],
    ]
    write_page(path, f"Games in sequence: {run.name}", facts, [part for part in parts if part])


def _retention(results: dict) -> str:
    if len(results["evaluations"]) < 2:
        return ""
    metrics, games = results["metrics"], results["games"]
    scores = np.array(metrics["scores"], dtype=float)
    returns = [[record["return"] for record in row] for row in results["evaluations"]]
    rows = ["before"] + [f"{n + 1}. {'+'.join(phase)}" for n, phase in enumerate(results["phases"])][
        : len(returns) - 1
    ]
    figure = {
        "data": [
            {
                "type": "heatmap",
                # A cell without a value would not show its text either.
                "z": np.nan_to_num(scores).clip(0, 1).tolist(),
                "x": games,
                "y": rows,
                "zmin": 0,
                "zmax": 1,
                "colorscale": SCALE,
                "text": [[f"{value:.1f}" for value in row] for row in returns],
                "texttemplate": "%{text}",
                "hoverinfo": "none",
                "colorbar": {"title": {"text": "score"}},
            }  # fmt: skip
        ],
        "layout": LAYOUT
        | {
            "height": 60 + 36 * len(rows),
            "margin": {"l": 10, "r": 10, "t": 10, "b": 50},
            "yaxis": {"autorange": "reversed", "automargin": True},
        },
    }
    named = {
        "average_forgetting": "average forgetting",
        "backward_transfer": "backward transfer",
        "final_score": "score at the end, mean over games",
    }
    figures = [[label, f"{metrics[name]:.2f}"] for name, label in named.items() if metrics.get(name) is not None]
    sentence = (
        "Raw return on each game (columns) after each phase (rows); colour is the score, 0 for random actions and 1 "
        "for the agent as it had just learned the game. Games that it learned no better than chance have no score."
    )
    return section("What was kept", sentence, plot("retention", figure), table(["", "score"], figures))


def _learning(lines: list[dict]) -> str:
    points = [line for line in lines if "charts/episodic_return" in line]
    if not points:
        return ""
    traces = []
    for number, game in enumerate(dict.fromkeys(line["game"] for line in points)):
        own = [line for line in points if line["game"] == game]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": game,
                "x": [line["step"] for line in own],
                "y": [line["charts/episodic_return"] for line in own],
                "line": {"color": _COLOURS[number % len(_COLOURS)]},
            }  # fmt: skip
        )
    layout = _LINES | {"yaxis": {"title": {"text": "return"}}}
    return section(
        "How it was learned", "Raw return of the last hundred episodes of the game under way.",
        plot("learning", {"data": traces, "layout": layout}),
    )  # fmt: skip


def _store(lines: list[dict], results: dict) -> list[str]:
    own = [line for line in lines if "store/acting/hit_rate" in line]
    if not own:
        return []
    steps = [line["step"] for line in own]
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": label,
            "x": steps,
            "y": [line[name] for line in own],
            "line": {"color": _COLOURS[number]},
        }  # fmt: skip
        for number, (name, label) in enumerate(_RATES.items())
    ]
    together = [line["store/updating/hit_rate"] + line["store/updating/ram_hit_rate"] for line in own]
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "updating, fast tier or RAM",
            "x": steps,
            "y": together,
            "line": {"color": _COLOURS[2]},
        }  # fmt: skip
    )
    changes = [line["step"] for before, line in zip(own, own[1:], strict=False) if line["game"] != before["game"]]
    marks = [
        {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "line": {"color": "#999", "dash": "dot"}}
        for step in changes
    ]
    layout = _LINES | {"shapes": marks, "yaxis": {"range": [0, 1.02]}}
    parts = [
        section(
            "Where the experts were",
            "Share of the experts asked for that were there; dotted lines are game changes.",
            plot("hit rates", {"data": traces, "layout": layout}),
        )  # fmt: skip
    ]
    columns = {
        "stall_ms": "stall at change, ms", "stall_ms_per_update": "of an update, ms",
        "updates_until_warm": "updates until warm", "seconds_until_warm": "seconds",
        "lead_ms": "forecast ahead, ms", "detector_recall": "by the detector",
        "recency_recall": "by recency",
    }  # fmt: skip
    rows = [
        ["+".join(switch["games"]), *(f"{switch[name]:.2f}" if name in switch else "-" for name in columns)]
        for switch in results["switches"]
    ]
    parts.append(
        section(
            "Game changes",
            "What the beginning of each game has cost, and which share of the experts of its first "
            "rollout was foretold by the detector and by recency alone.",
            table(["game", *columns.values()], rows),
        )  # fmt: skip
    )
    return parts


def _experts(results: dict) -> list[str]:
    counts = np.array(results["expert_counts"], dtype=float)
    if counts.ndim != 3 or counts.shape[0] < 2 or counts.shape[2] < 2:
        return []
    shares = counts / counts.sum(axis=2, keepdims=True).clip(min=1)
    plots = []
    for layer in range(counts.shape[1]):
        own = shares[:, layer]
        # Experts beside each other that the same game uses most.
        order = np.lexsort((-own.max(axis=0), own.argmax(axis=0)))
        figure = {
            "data": [
                {
                    "type": "heatmap", "z": own[:, order].tolist(), "y": results["games"], "colorscale": SCALE,
                    "x": [str(expert) for expert in order],
                    "hovertemplate": "expert %{x}, %{y}: %{z:.1%}<extra></extra>",
                }  # fmt: skip
            ],
            "layout": LAYOUT | {
                "height": 50 + 26 * len(results["games"]), "margin": {"l": 10, "r": 10, "t": 40, "b": 10},
                "title": {"text": f"layer {layer}"}, "yaxis": {"automargin": True, "autorange": "reversed"},
                "xaxis": {"type": "category", "showticklabels": False, "ticks": ""},
            },
        }  # fmt: skip
        plots.append(plot(f"experts of layer {layer}", figure))
    names = {
        "information": "information, bits", "information_corrected": "bias-corrected", "shuffled": "shuffled games",
        "normalised": "above chance, of what is possible",
    }  # fmt: skip
    rows = [
        [str(layer), *(f"{figure[name]:.3f}" for name in names)]
        for layer, figure in enumerate(results["specialisation"])
    ]
    sentence = (
        "Share of each game's tokens (rows) that each expert (columns, in the order of their games) gets after the "
        "last phase; below, what the expert tells about the game."
    )
    return [section("Experts and games", sentence, *plots, table(["layer", *names.values()], rows))]

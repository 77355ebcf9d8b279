"""The pathways of a policy as one HTML page that opens without a network, and its numbers as JSON beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .pathway_analysis import (
    ACTIONS,
    ExpertUse,
    PathwayRecords,
    expert_use,
    learned_pathway_complexity,
    pathway_distinctness,
    rank_correlation,
    routing_consistency,
)
from .pathway_film import expert_colours, expert_name, film_part, legend_group
from .policy_evaluation import ALL_LEVELS
from .report_page import HOVER, LAYOUT, PALETTE, SCALE, choice, count, plot, section, table, write_page

NUMBERS = "pathways.json"
ALL_TASKS = "all tasks"


def pathway_findings(
    records: PathwayRecords,
    model_name: str,
    others: Mapping[str, ExpertUse] | None = None,
    difficulty: Mapping[str, dict] | None = None,
    plays: Sequence[dict] = (),
) -> dict:
    """
    All numbers of the report, for JSON.

    Args:
        records ([`PathwayRecords`]): What the policy did.
        model_name (`str`): What it is called.
        others (`Mapping[str, ExpertUse]`, *optional*): The use by task of other trainings of the same architecture.
        difficulty (`Mapping[str, dict]`, *optional*): What [`task_difficulty`] returned.
        plays (`Sequence[dict]`): What [`self_sufficiency`] returned.
    """
    by_task, complexity = expert_use(records, "task"), learned_pathway_complexity(records)
    both = [level for level in records.levels if level in (difficulty or {})]
    tasks = {ALL_TASKS: records} | {level: records.of_task(level) for level in records.levels}
    return {
        "model": model_name,
        "expert_sizes": records.expert_sizes,
        "episodes": {level: _outcome(records, level) for level in records.levels},
        "shown_episodes": {level: _shown_episode(records, level) for level in records.levels},
        "use_by_task": by_task.as_records(),
        "use_by_phase": {name: expert_use(part, "phase").as_records() for name, part in _alone(tasks).items()},
        "use_by_cell": {name: _use_by_cell(records, part) for name, part in _places(records).items()},
        "complexity": complexity,
        "difficulty": dict(difficulty or {}),
        "complexity_and_difficulty": rank_correlation(
            [complexity[level]["complexity"] for level in both], [difficulty[level]["difficulty"] for level in both]
        ),
        "checkpoints": [model_name, *(others or {})],
        "consistency": routing_consistency([by_task, *(others or {}).values()]),
        "distinctness": pathway_distinctness(by_task),
        "self_sufficiency": list(plays),
    }


def _alone(parts: dict) -> dict:
    """Without the first part, which is all, if there is but one other."""
    return parts if len(parts) > 2 else dict(list(parts.items())[1:])


def _outcome(records: PathwayRecords, level: str) -> dict:
    own = [episode for episode in records.episodes if episode.level == level]
    of_task = records.of_task(level).steps
    return {
        "episodes": len(own),
        "success": float(np.mean([episode.success for episode in own])),
        "length": float(np.mean([episode.length for episode in own])),
        "entropy": float(of_task["entropy"].mean()),
    }


def _shown_episode(records: PathwayRecords, level: str) -> dict:
    """A solved episode that is longer than most, because more happens in it; otherwise the first one."""
    own = [episode for episode in records.episodes if episode.level == level]
    solved = sorted((episode for episode in own if episode.success), key=lambda episode: episode.length)
    episode = solved[3 * len(solved) // 4] if solved else own[0]
    part = records.of_task(level)
    part = part.select(part.steps["seed"] == episode.seed)
    return {
        "seed": episode.seed,
        "success": episode.success,
        "steps": [
            {
                "cell": [int(step["x"]), int(step["y"])],
                "carried": records.carried[step["carried"]],
                "phase": records.phases[step["phase"]],
                "action": ACTIONS[step["action"]],
                "entropy": float(step["entropy"]),
                "weights": [layer[index].tolist() for layer in part.weights],
            }
            for index, step in enumerate(part.steps)
        ],
    }


def _places(records: PathwayRecords) -> dict[str, list[int]]:
    """Which tasks share a map: those of one room and the same size together, and each alone."""
    together: dict[str, list[int]] = {}
    for index, ((columns, rows), rooms) in enumerate(zip(records.grids, records.rooms, strict=True)):
        if rooms == 1:
            together.setdefault(f"one room of {columns} by {rows} cells", []).append(index)
    together = {f"{name}: {count(len(part), 'task')}": part for name, part in together.items() if len(part) > 1}
    return together | {level: [index] for index, level in enumerate(records.levels)}


def _use_by_cell(records: PathwayRecords, tasks: list[int]) -> dict:
    use = expert_use(records.select(np.isin(records.steps["task"], tasks)), "cell")
    columns, rows = records.grids[tasks[0]]
    return {"columns": columns, "rows": rows, "cells": use.as_records()}


def write_pathway_report(records: PathwayRecords, findings: dict, path: str | Path) -> None:
    """
    Write the page, and `pathways.json` beside it, whatever these files hold.

    Args:
        records ([`PathwayRecords`]): What the policy did.
        findings (`dict`): What [`pathway_findings`] made of it.
        path (`str` or `Path`): The page.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(NUMBERS).write_text(json.dumps(findings, indent=1) + "\n", encoding="utf-8")
    outcomes = findings["episodes"].values()
    success = float(np.mean([outcome["success"] for outcome in outcomes]))
    facts = [
        count(len(records.levels), "task"),
        f"{count(len(records.episodes), 'held-out episode')}, played greedily, {success:.0%} solved",
        count(len(records.steps), "step"),
        "experts of sizes " + " and then ".join(", ".join(map(str, sizes)) for sizes in records.expert_sizes),
    ]
    sections = [
        _episodes_section(findings),
        _use_section("Expert use by task", "use", "task", {ALL_TASKS: findings["use_by_task"]}, findings),
        _use_section("Expert use by subgoal phase", "phase", "phase", findings["use_by_phase"], findings),
        _cells_section(findings),
        _complexity_section(findings),
        _difficulty_section(findings),
        _consistency_section(findings),
        _distinctness_section(findings),
        _sufficiency_section(findings),
    ]
    write_page(path, f"Pathways of {findings['model']}", facts, sections)


def _short(level: str) -> str:
    return level.removeprefix("BabyAI-").removesuffix("-v0")


def _episodes_section(findings: dict) -> str:
    sentence = (
        "One episode of each task, to be walked through with the slider or by clicks on the timeline, whose rows show "
        "how the router of each layer weighs its experts (the larger, the darker) and what the bot would now be about."
    )
    parts = []
    for level, episode in findings["shown_episodes"].items():
        outcome, steps = findings["episodes"][level], count(len(episode["steps"]), "step")
        facts = [
            f"seed {episode['seed']}, {'' if episode['success'] else 'not '}solved in {steps}",
            f"of all {outcome['episodes']} episodes, {outcome['success']:.0%} are solved",
        ]
        parts.append((_short(level), film_part(level, episode, facts, findings["expert_sizes"])))
    return section("Routing over an episode", sentence, choice("Task", parts))


def _use_section(title: str, name: str, thing: str, uses: dict[str, list[dict]], findings: dict) -> str:
    sentence = (
        f"The mean weight of each layer's experts over all steps of a {thing}, stacked from the smallest expert "
        "to the largest, which is the darkest."
    )
    if name == "phase":
        sentence += " A phase is the kind of the bot's first subgoal: the bot watches what the policy does."
    parts = [
        (_short(part), plot(f"{name} {part}", _use_figure(use, findings["expert_sizes"])))
        for part, use in uses.items()
    ]
    return section(title, sentence, choice("Task", parts))


def _use_figure(use: list[dict], expert_sizes: list[list[int]]) -> dict:
    names, width = [_short(row["group"]) for row in use], 1 / len(expert_sizes)
    traces, layout = [], {"yaxis": {"autorange": "reversed", "automargin": True, "type": "category"}}
    for layer, sizes in enumerate(expert_sizes):
        number, title = layer + 1 if layer else "", f"layer {layer}"
        domain = [layer * width, (layer + 0.92) * width]
        layout[f"xaxis{number}"] = {"domain": domain, "range": [0, 1], "tickformat": ".0%", "title": {"text": title}}
        shared = {"type": "bar", "orientation": "h", "y": names, "xaxis": f"x{number}", "hovertemplate": HOVER}
        colours = expert_colours(sizes)
        for expert in sorted(range(len(sizes)), key=lambda index: sizes[index]):
            name, weights = expert_name(sizes, expert), [row["weights"][layer][expert] for row in use]
            hover = [
                f"{row['group']}, {count(row['steps'], 'step')}<br>{title}, {name}: {weight:.1%}"
                for row, weight in zip(use, weights, strict=True)
            ]
            own = {"x": weights, "customdata": hover, "name": name, "marker": {"color": colours[expert]}}
            traces.append(shared | own | legend_group(title))
    height = max(100 + 34 * len(use), 90 + sum(36 + 20 * len(sizes) for sizes in expert_sizes))
    layout |= {"barmode": "stack", "height": height, "minwidth": 700, "margin": {"l": 10, "r": 10, "t": 10, "b": 50}}
    return {"data": traces, "layout": LAYOUT | layout | {"legend": {"traceorder": "grouped"}}}


def _cells_section(findings: dict) -> str:
    sentence = (
        "The mean weight of each expert, by the cell that the agent stands in: a row for each layer, a map for each "
        "expert, each with a scale of its own because differences are small; cells that were never entered are grey."
    )
    parts = [
        (_short(name), plot(f"cells {name}", _cells_figure(use, findings["expert_sizes"])))
        for name, use in findings["use_by_cell"].items()
    ]
    return section("Expert use by grid cell", sentence, choice("Where", parts))


def _cells_figure(use: dict, expert_sizes: list[list[int]]) -> dict:
    most = max(map(len, expert_sizes))
    width, height = 1 / most, 1 / len(expert_sizes)
    traces, layout, titles = [], {}, []
    hidden = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False, "constrain": "domain"}
    for layer, sizes in enumerate(expert_sizes):
        for expert in range(len(sizes)):
            left, low = expert * width, 1 - (layer + 1) * height
            number = str(len(traces) + 1) if traces else ""
            traces.append(_cells_trace(use, layer, expert) | {"xaxis": f"x{number}", "yaxis": f"y{number}"})
            scale = {"thickness": 8, "len": 0.7 * height, "outlinewidth": 0, "tickformat": ".0%", "nticks": 4}
            traces[-1]["colorbar"] = scale | {"x": left + 0.76 * width, "y": low + 0.45 * height, "xanchor": "left"}
            across = {"domain": [left, left + 0.74 * width], "range": [-0.5, use["columns"] - 0.5]}
            down = {"domain": [low + 0.08 * height, low + 0.82 * height], "range": [use["rows"] - 0.5, -0.5]}
            layout[f"xaxis{number}"] = hidden | across | {"anchor": f"y{number}"}
            layout[f"yaxis{number}"] = hidden | down | {"anchor": f"x{number}", "scaleanchor": f"x{number}"}
            place = {"x": left + 0.37 * width, "y": low + 0.84 * height, "xref": "paper", "yref": "paper"}
            text = f"layer {layer}, {expert_name(sizes, expert)}"
            titles.append(place | {"text": text, "showarrow": False, "xanchor": "center", "yanchor": "bottom"})
    layout |= {"annotations": titles, "height": 270 * len(expert_sizes), "minwidth": 260 * most}
    layout |= {"margin": {"l": 10, "r": 40, "t": 10, "b": 10}, "plot_bgcolor": "#ececea"}
    return {"data": traces, "layout": LAYOUT | layout}


def _cells_trace(use: dict, layer: int, expert: int) -> dict:
    shape = use["rows"], use["columns"]
    weights, hover = np.full(shape, None), np.full(shape, "never entered", dtype=object)
    for cell in use["cells"]:
        x, y = cell["group"]
        weights[y, x] = cell["weights"][layer][expert]
        hover[y, x] = f"column {x}, row {y}: {weights[y, x]:.1%} in {count(cell['steps'], 'step')}"
    trace = {"type": "heatmap", "z": weights.tolist(), "customdata": hover.tolist(), "hovertemplate": HOVER}
    return trace | {"colorscale": SCALE, "xgap": 1, "ygap": 1}


def _complexity_section(findings: dict) -> str:
    sentence = (
        "What the pathways of each task cost, as a share of always using the largest expert of every layer: an "
        "expert's weight times its size to the exponent of the policy's routing cost, summed over the layers."
    )
    rows = sorted(findings["complexity"].items(), key=lambda item: item[1]["share"])
    names, shares = [_short(level) for level, _ in rows], [row["share"] for _, row in rows]
    hover = [f"{name}: {row['complexity']:,.1f}" for name, (_, row) in zip(names, rows, strict=True)]
    bars = {"type": "bar", "orientation": "h", "x": shares, "y": names, "customdata": hover, "hovertemplate": HOVER}
    bars |= {"texttemplate": "%{x:.1%}", "textposition": "auto", "marker": {"color": "#8fb3d4"}}
    layout = LAYOUT | {"height": 80 + 34 * len(rows), "margin": {"l": 10, "r": 20, "t": 10, "b": 40}}
    layout["xaxis"] = {"tickformat": ".0%", "rangemode": "tozero"}
    layout["yaxis"] = {"automargin": True, "type": "category"}
    return section("Learned pathway complexity", sentence, plot("complexity", {"data": [bars], "layout": layout}))


def _difficulty_section(findings: dict) -> str:
    title, difficulty = "Complexity and difficulty", findings["difficulty"]
    levels = [level for level in findings["complexity"] if level in difficulty]
    if not levels:
        return section(
            title,
            "Missing: whether harder tasks have more complex pathways needs runs that learned one of them each; "
            "give their folders with --difficulty_runs.",
        )
    correlation = findings["complexity_and_difficulty"]
    sentence = (
        "Each task's complexity against the natural logarithm of the median updates that runs with this task alone "
        f"needed until their loss stayed below {difficulty[levels[0]]['threshold']:g}; rising from left to right says "
        "that harder tasks take larger experts. "
    )
    sentence += (
        "A rank correlation needs three tasks that differ."
        if correlation is None
        else f"Spearman's rank correlation is {correlation:.2f} over {len(levels)} tasks."
    )
    late = [level for level in levels if difficulty[level]["unreached"]]
    if late:
        sentence += f" At least so difficult, because a run never got there: {', '.join(map(_short, late))}."
    hover = [
        f"{_short(level)}<br>updates: {', '.join(map(str, difficulty[level]['updates']))}"
        f"<br>of them never below: {difficulty[level]['unreached']}"
        for level in levels
    ]
    points = {"type": "scatter", "mode": "markers+text", "text": [_short(level) for level in levels]}
    points |= {"x": [difficulty[level]["difficulty"] for level in levels], "textposition": "top center"}
    points |= {"y": [findings["complexity"][level]["share"] for level in levels], "cliponaxis": False}
    points |= {"customdata": hover, "hovertemplate": HOVER}
    symbols = ["triangle-right" if level in late else "circle" for level in levels]
    points |= {"marker": {"size": 11, "color": "#2f5d8a", "symbol": symbols}}
    layout = LAYOUT | {"height": 340, "margin": {"l": 70, "r": 60, "t": 30, "b": 50}}
    layout |= {"xaxis": {"title": {"text": "difficulty, log of updates"}, "gridcolor": "#eee", "zeroline": False}}
    layout |= {"yaxis": {"title": {"text": "complexity"}, "tickformat": ".3p", "gridcolor": "#eee", "zeroline": False}}
    return section(title, sentence, plot("difficulty", {"data": [points], "layout": layout}))


def _consistency_section(findings: dict) -> str:
    title, consistency = "Routing consistency", findings["consistency"]
    if consistency is None:
        return section(
            title,
            "Missing: whether other trainings come to the same pathways needs checkpoints of the same layers from "
            "other seeds; give them with --other_seeds.",
        )
    sentence = (
        f"How alike {len(findings['checkpoints'])} checkpoints use their experts by task, as the mean correlation "
        f"over {count(consistency['pairs'], 'pair')} (1 is the same), beside two controls: without each expert's mean "
        "over the tasks only what is special to tasks is left, and with tasks exchanged only what is common to them."
    )
    rows = [
        [f"layer {row['layer']}" if row["layer"] != "all" else "all layers"]
        + [_number(row[name]) for name in ("correlation", "task_specific", "exchanged_tasks")]
        for row in consistency["layers"]
    ]
    return section(title, sentence, table(["", "use by task", "without each expert's mean", "tasks exchanged"], rows))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _distinctness_section(findings: dict) -> str:
    title, distinctness = "Distinctness of tasks", findings["distinctness"]
    if distinctness["divergence"] is None:
        return section(
            title,
            "Missing: pathways can differ only between tasks, and where layers have several experts; give several "
            "tasks with --env_id.",
        )
    layers = ", ".join(f"{row['divergence']:.4f} in layer {row['layer']}" for row in distinctness["layers"])
    sentence = (
        "How different the mean weights of two tasks are, as the Jensen-Shannon divergence in bits, averaged over the "
        f"layers: 0 is the same pathway, 1 shares no expert. The mean over all pairs is {layers}."
    )
    names = [_short(row["group"]) for row in findings["use_by_task"]]
    trace = {"type": "heatmap", "x": names, "y": names, "z": distinctness["between"], "colorscale": SCALE}
    trace |= {"zmin": 0, "xgap": 2, "ygap": 2}
    trace |= {"texttemplate": "%{z:.2~g}", "hovertemplate": "%{y} and %{x}: %{z:.5f}<extra></extra>"}
    trace |= {"colorbar": {"thickness": 12, "outlinewidth": 0, "tickformat": ".2~g"}}
    layout = LAYOUT | {"height": 130 + 38 * len(names), "minwidth": 90 * len(names)}
    layout |= {"xaxis": {"automargin": True}, "yaxis": {"autorange": "reversed", "automargin": True}}
    layout |= {"margin": {"l": 10, "r": 10, "t": 10, "b": 10}}
    return section(title, sentence, plot("distinctness", {"data": [trace], "layout": layout}))


def _sufficiency_section(findings: dict) -> str:
    title, plays = "Self-sufficiency and lesion", findings["self_sufficiency"]
    if not plays:
        return section(title, "Missing: the episodes have to be played again without some experts.")
    sentence = (
        "Success when experts below a weight are dropped at every step (left: a flat line is a pathway that can do "
        "without what it hardly uses), and when the largest expert of every layer is (right: a steep line needs it)."
    )
    levels = [level for level in dict.fromkeys(row["level"] for row in plays) if level != ALL_LEVELS]
    traces = []
    for index, level in enumerate(levels):
        own = [row for row in plays if row["level"] == level]
        curve = [row for row in own if not row["lesion_largest"]]
        lesion = curve[:1] + [row for row in own if row["lesion_largest"]]
        look = {"type": "scatter", "name": _short(level), "legendgroup": level, "mode": "lines+markers"}
        look |= {"line": {"color": f"#{PALETTE.split()[index % 10]}"}}
        traces.append(look | _points(curve) | {"x": [row["weight_threshold"] for row in curve]})
        names = {"x": ["all experts", "without the largest"], "xaxis": "x2", "showlegend": False}
        traces.append(look | _points(lesion) | names)
    layout = LAYOUT | {"height": 380, "minwidth": 700, "margin": {"l": 60, "r": 10, "t": 10, "b": 50}}
    layout["yaxis"] = {"range": [-0.03, 1.03], "tickformat": ".0%", "gridcolor": "#eee", "title": {"text": "success"}}
    title_of_x = {"text": "weight below which experts are dropped"}
    layout["xaxis"] = {"domain": [0, 0.62], "title": title_of_x, "showgrid": False, "zeroline": False}
    layout["xaxis2"] = {"domain": [0.68, 1], "showgrid": False}
    return section(title, sentence, plot("self sufficiency", {"data": traces, "layout": layout}))


def _points(records: list[dict]) -> dict:
    hover = [
        f"{_short(row['level'])}: {row['success']:.1%} ({row['success_low']:.1%} to {row['success_high']:.1%})"
        for row in records
    ]
    return {"y": [row["success"] for row in records], "customdata": hover, "hovertemplate": HOVER}

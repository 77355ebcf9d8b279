"""
A look inside a mixture of experts: the routes of a text as one HTML page and as a picture.

Shapes: tokens, of one text; top_k, the experts that one token uses in a layer; experts, of one layer.
"""

import colorsys
import html
import itertools
import json
import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from string import Template

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..modeling.routing_statistics import (
    expert_counts,
    token_entropies,
)
from .report_page import HOVER, LAYOUT, PALETTE, SCALE, count, plot, rgba, section, write_page
from .routes import Routes


def write_load_heatmap(routes: Routes, path: str | Path, layers: range | None = None) -> None:
    """Draw the load of every expert in every layer as a PNG."""
    routes = routes.select_layers(layers)
    load = _load_matrix(routes)
    rows, columns = len(load), routes.num_experts
    figure = Figure(figsize=(2 + min(0.55 * columns, 16), 1.6 + min(0.45 * rows, 16)), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(load, cmap="Blues", vmin=0, aspect="auto")
    axes.set_title(f"Expert load, {len(routes.tokens)} tokens", fontsize=11, loc="left")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(rows), [layer.layer for layer in routes.layers])
    if columns <= 32:
        axes.set_xticks(range(columns))
    if columns <= 16:
        for row, column in itertools.product(range(rows), range(columns)):
            colour = "white" if load[row][column] > 0.6 * image.norm.vmax else "black"
            axes.text(column, row, f"{load[row][column]:.0%}", ha="center", va="center", fontsize=7, color=colour)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, format=PercentFormatter(1), label="share of the assignments")
    figure.savefig(path)


def _load_matrix(routes: Routes) -> list[list[float]]:
    """(layers, experts), with nan where a layer has fewer experts than another."""
    return [
        layer.load.tolist() + [math.nan] * (routes.num_experts - layer.logits.shape[-1]) for layer in routes.layers
    ]


def route_links(routes: Routes) -> dict[tuple, Counter]:
    """
    The links of the Sankey diagram, and what each token contributes to their widths.

    A node is `("token", position)` or `(layer, expert)`. A link's width is the routing weight of the layer that it
    enters: a token's links into an expert add up to the token's weight there, split over the experts from which it
    comes in proportion to their weights.

    Args:
        routes (`Routes`): The routes.

    Returns:
        `dict[tuple, Counter]`: For each pair of nodes, the width by token position.
    """
    links = defaultdict(Counter)
    for position in range(len(routes.tokens)):
        sources = [(("token", position), 1.0)]
        for layer in routes.layers:
            slots = layer.slots(position)
            targets = [((layer.layer, expert), weight) for expert, weight, _ in slots if weight > 0]
            total = sum(weight for _, weight in sources)
            for source, share in sources:
                for target, weight in targets:
                    links[source, target][position] += weight * share / total
            # A token that gets no weight in a layer is dropped there: it goes on from where it was.
            sources = targets or sources
    return dict(links)


FOLLOW = Template("""<label>Follow <select id="follow"><option value="-1">all tokens</option>$options</select></label>
<script>
document.getElementById("follow").addEventListener("change", event => {
  const token = Number(event.target.value), calm = $calm, strong = $strong;
  const colours = $tokens.map((tokens, link) =>
    token < 0 ? calm[link] : tokens.includes(token) ? strong[link] : "rgba(0,0,0,0.04)");
  Plotly.restyle("routes", {"link.color": [colours]}, [0]);
});
</script>""")


def write_report(routes: Routes, path: str | Path, layers: range | None = None, max_tokens: int = 64) -> None:
    """
    Write the routes as one HTML page that needs no network: the tokens' routes as a Sankey diagram, the load of the
    experts, the entropy of the routers and, for recurrent experts, the steps of every token.

    Args:
        routes (`Routes`): What [`record_routes`] returned.
        path (`str` or `Path`): The file to write, whatever it holds.
        layers (`range`, *optional*): The layers to show.
        max_tokens (`int`, defaults to 64): How many tokens the pictures that show single tokens show. Loads and
            entropies are of all.
    """
    routes = routes.select_layers(layers)
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: the diagram needs at least one token.")
    shown = replace(routes, tokens=routes.tokens[:max_tokens])
    total, numbers = len(routes.tokens), [layer.layer for layer in routes.layers]
    span = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"number {numbers[0]}"
    which = f"the first {max_tokens} of {total} tokens" if total > max_tokens else f"the {count(total, 'token')}"
    facts = [
        count(total, "token")
        + (f" (the beginning of a text of {routes.num_text_tokens})" if total < routes.num_text_tokens else ""),
        f"{count(len(numbers), 'layer')} with experts ({span})",
        f"{count(routes.num_experts, 'expert')} each, {routes.layers[0].indices.shape[1]} per token",
    ]
    sections = [
        _routes_section(shown, which),
        _section(
            "Expert load",
            "The share of a layer's assignments that each expert received; a perfectly balanced layer has "
            f"{1 / routes.num_experts:.1%} everywhere.",
            _load_figure(routes),
        ),
        _section(
            "Router entropy",
            "How undecided the router of a layer is, averaged over the tokens: 0 is always sure of one expert, the "
            "dotted line is no preference at all.",
            _entropy_figure(routes),
        ),
    ]
    if any(layer.steps is not None for layer in routes.layers):
        sentence = f"The recurrences that the experts of a token ran, averaged over its experts, for {which}."
        sections.append(_section("Recurrence steps", sentence, _steps_figure(shown)))
    text = f"<blockquote>{html.escape(''.join(routes.tokens))}</blockquote>"
    write_page(path, f"Routes through {routes.model_name}", facts, sections, introduction=text)


def _section(title: str, sentence: str, figure: dict, extra: str = "") -> str:
    return section(title, sentence, extra, plot(title, figure))


def _routes_section(routes: Routes, which: str) -> str:
    links = route_links(routes)
    colours = _expert_colours(routes.num_experts)
    figure = _sankey_figure(routes, links, colours)
    labels = [_token_label(routes, position) for position in range(len(routes.tokens))]
    follow = FOLLOW.substitute(
        options="".join(f'<option value="{position}">{label}</option>' for position, label in enumerate(labels)),
        tokens=json.dumps([list(widths) for widths in links.values()]),
        calm=json.dumps(figure["data"][0]["link"]["color"]),
        strong=json.dumps([rgba(colours[target[1]], 0.85) for _, target in links]),
    )
    sentence = (
        f"Where {which} go, from the text on the left through the numbered experts of each layer; a band is as wide "
        "as the routing weights that enter its expert, and has the colour of that expert."
    )
    return _section("Routes", sentence, figure, follow)


def _sankey_figure(routes: Routes, links: dict[tuple, Counter], colours: list[str]) -> dict:
    tokens = [("token", position) for position in range(len(routes.tokens))]
    # An expert's tokens, with the weights that they bring.
    experts = defaultdict(Counter)
    for (_, target), widths in links.items():
        experts[target].update(widths)
    number = {node: index for index, node in enumerate([*tokens, *sorted(experts)])}
    names = {node: _token_label(routes, node[1]) for node in tokens}
    names |= {node: f"layer {node[0]}, expert {node[1]}" for node in experts}
    nodes = {
        "sort": "input",
        "pad": 6,
        "thickness": 14,
        "line": {"width": 0},
        "label": [names[node] if node[0] == "token" else str(node[1]) for node in number],
        "color": ["#c9c9c4"] * len(tokens) + [f"#{colours[expert]}" for _, expert in sorted(experts)],
        "customdata": [_token_hover(routes, position) for _, position in tokens]
        + [names[node] + _widths_hover(routes, experts[node]) for node in sorted(experts)],
        "hovertemplate": HOVER,
    }
    bands = {
        "source": [number[source] for source, _ in links],
        "target": [number[target] for _, target in links],
        "value": [widths.total() for widths in links.values()],
        "color": [rgba(colours[target[1]], 0.35) for _, target in links],
        "customdata": [
            f"{names[source]} → {names[target]}{_widths_hover(routes, widths)}"
            for (source, target), widths in links.items()
        ],
        "hovertemplate": HOVER,
    }
    columns = ["tokens", *(f"layer {layer.layer}" for layer in routes.layers)]
    height = max(320, 18 * max(len(tokens), routes.num_experts))
    nodes |= _node_places(routes, tokens, experts, height, nodes["pad"])
    layout = LAYOUT | {
        "height": height + 46,
        "minwidth": 120 * len(columns),
        "margin": {"l": 10, "r": 10, "t": 36, "b": 10},
        "annotations": [_heading(text, column / (len(columns) - 1)) for column, text in enumerate(columns)],
    }
    sankey = {"type": "sankey", "arrangement": "snap", "textfont": {"size": 11}, "node": nodes, "link": bands}
    return {"data": [sankey], "layout": layout}


def _node_places(routes: Routes, tokens: list, experts: dict, height: float, pad: float) -> dict[str, list[float]]:
    """Columns as high as the diagram, in the order of the text and of the experts; plotly's own drift."""
    columns = [routes.layers[0].weights[: len(tokens)].sum(dim=-1).tolist()]
    for layer in routes.layers:
        columns.append([experts[node].total() for node in sorted(experts) if node[0] == layer.layer])
    scale = min((height - pad * (len(column) - 1)) / sum(column) for column in columns if column)
    x, y = [], []
    for index, column in enumerate(columns):
        gap = (height - scale * sum(column)) / max(len(column) - 1, 1)
        top = 0.0 if len(column) > 1 else gap / 2
        for width in column:
            # Plotly takes an exact 0 for no place at all.
            x.append(min(max(index / (len(columns) - 1), 0.001), 0.999))
            y.append(max((top + scale * width / 2) / height, 0.001))
            top += scale * width + gap
    return {"x": x, "y": y}


def _heading(text: str, x: float) -> dict:
    anchor = {0: "left", 1: "right"}.get(x, "center")
    place = {"x": x, "xref": "paper", "xanchor": anchor, "y": 1, "yref": "paper", "yanchor": "bottom", "yshift": 8}
    return place | {"text": text, "showarrow": False, "font": {"size": 12, "color": "#777"}}


def _load_figure(routes: Routes) -> dict:
    hover = []
    for layer in routes.layers:
        total, counts = layer.indices.numel(), expert_counts(layer.indices, layer.logits.shape[-1]).tolist()
        hover.append(
            [
                f"layer {layer.layer}, expert {expert}<br>{number} of {total} assignments, {number / total:.1%}"
                for expert, number in enumerate(counts)
            ]
        )
    figure = _heatmap(_load_matrix(routes), hover, routes, [str(expert) for expert in range(routes.num_experts)])
    figure["data"][0]["colorbar"]["tickformat"] = ".0%"
    figure["layout"]["xaxis"] |= {"title": {"text": "expert"}}
    if routes.num_experts <= 16:
        figure["data"][0] |= {"texttemplate": "%{z:.0%}", "textfont": {"size": 11}}
    return figure


def _steps_figure(routes: Routes) -> dict:
    labels = [_token_label(routes, position) for position in range(len(routes.tokens))]
    means, hover = [], []
    for layer in routes.layers:
        steps = torch.full(layer.indices.shape, math.nan) if layer.steps is None else layer.steps.float()
        means.append(steps[: len(labels)].mean(dim=-1).tolist())
        slots = [layer.slots(position) for position in range(len(labels))]
        lines = ["".join(f"<br>expert {expert}: {steps} steps" for expert, _, steps in token) for token in slots]
        hover.append([f"{label}, layer {layer.layer}{line}" for label, line in zip(labels, lines, strict=True)])
    figure = _heatmap(means, hover, routes, labels)
    figure["layout"]["xaxis"]["tickangle"] = -60
    figure["layout"]["height"] += 90
    return figure


def _heatmap(values: list[list[float]], hover: list[list[str]], routes: Routes, columns: list[str]) -> dict:
    trace = {
        "type": "heatmap",
        "z": [[None if math.isnan(value) else value for value in row] for row in values],
        "zmin": 0,
        "zmax": max(value for row in values for value in row if not math.isnan(value)),
        "y": [f"layer {layer.layer}" for layer in routes.layers],
        "customdata": hover,
        "hovertemplate": HOVER,
        "colorscale": SCALE,
        "colorbar": {"thickness": 12, "outlinewidth": 0},
        "xgap": 2,
        "ygap": 2,
    }
    every = 1 + len(columns) // 64
    ticks = {"tickvals": list(range(len(columns)))[::every], "ticktext": columns[::every]}
    layout = LAYOUT | {
        "height": 90 + max(60, 34 * len(routes.layers)),
        "minwidth": 14 * len(columns),
        "margin": {"l": 70, "r": 10, "t": 10, "b": 50},
        "xaxis": {"showgrid": False, "zeroline": False, "automargin": True} | ticks,
        "yaxis": {"showgrid": False, "zeroline": False, "autorange": "reversed"},
    }
    return {"data": [trace], "layout": layout}


def _entropy_figure(routes: Routes) -> dict:
    bars = {
        "type": "bar",
        "x": [f"layer {layer.layer}" for layer in routes.layers],
        "y": [token_entropies(layer.logits, routes.scores).mean().item() for layer in routes.layers],
        "marker": {"color": "#8fb3d4"},
        "width": 0.5,
        "hovertemplate": "%{x}: %{y:.3f} nats<extra></extra>",
    }
    limits = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": bars["x"],
        "y": [math.log(layer.logits.shape[-1]) for layer in routes.layers],
        "line": {"dash": "dot", "color": "#999"},
        "hovertemplate": "no preference: %{y:.3f} nats<extra></extra>",
    }
    layout = LAYOUT | {
        "height": 260,
        "margin": {"l": 70, "r": 10, "t": 10, "b": 40},
        "showlegend": False,
        "xaxis": {"showgrid": False},
        "yaxis": {"title": {"text": "nats"}, "rangemode": "tozero", "gridcolor": "#eee"},
    }
    return {"data": [bars, limits], "layout": layout}


def _token_label(routes: Routes, position: int) -> str:
    """A token's position and text, cut short and escaped: plotly reads its labels as HTML, too."""
    text = routes.tokens[position].replace("\n", "⏎")
    text = text.strip() or text.replace(" ", "␣")
    text = text if len(text) <= 16 else f"{text[:15]}…"
    return f"{position} {html.escape(text)}"


def _token_hover(routes: Routes, position: int) -> str:
    lines = [f"<b>{_token_label(routes, position)}</b>"]
    for layer in routes.layers:
        slots = ", ".join(f"expert {expert} ({weight:.2f})" for expert, weight, _ in layer.slots(position))
        lines.append(f"layer {layer.layer}: {slots}")
    return "<br>".join(lines)


def _widths_hover(routes: Routes, widths: Counter, limit: int = 12) -> str:
    lines = [f"<br>weight {widths.total():.2f} from {count(len(widths), 'token')}"]
    lines += [f"{_token_label(routes, position)}: {width:.2f}" for position, width in widths.most_common(limit)]
    if len(widths) > limit:
        lines.append(f"and {len(widths) - limit} more")
    return "<br>".join(lines)


def _expert_colours(count: int) -> list[str]:
    """A colour for each expert, the same in every layer."""
    if count <= len(PALETTE.split()):
        return PALETTE.split()[:count]
    # Steps of the golden angle keep neighbours apart, however many there are.
    colours = (colorsys.hls_to_rgb(0.381966 * i % 1, 0.52 if i % 2 else 0.64, 0.45) for i in range(count))
    return ["".join(f"{round(255 * channel):02x}" for channel in rgb) for rgb in colours]

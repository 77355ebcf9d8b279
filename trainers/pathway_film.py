"""One episode as a part of a page: its frames, and under them how each layer's router weighs its experts."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from string import Template

import numpy as np
from PIL import Image

from .babyai_player import without_rejections
from .minigrid_fast_path import make_level
from .pathway_analysis import NO_PHASE
from .report_page import LAYOUT, PALETTE, identifier, plot

MAX_FRAMES = 128
# Frames of the strip above the timeline, and heights of its parts in pixels.
_STRIP = 12
_FRAMES_HEIGHT, _LAYER_HEIGHT, _PHASE_HEIGHT, _GAP, _MARGIN = 96, 84, 24, 12, 55
_GREY = "#d6d6d0"
_PHASES = ("GoNextTo", "Pickup", "Drop", "Open", "Explore", "Close")
_FILM = Template("""<div style="display: flex; flex-wrap: wrap; gap: 20px; align-items: center; margin: 12px 0">
<img id="$name-frame" src="$first" alt="the grid" style="max-width: 230px; max-height: 230px">
<div style="flex: 1; min-width: 260px"><b>$mission</b><p>$facts</p><p id="$name-caption"></p>
<input id="$name-step" type="range" min="1" max="$last" value="1" style="width: 100%" aria-label="step"></div></div>
$timeline
<script>
(() => {
  const frames = $frames, captions = $captions, part = name => document.getElementById("$name" + name);
  const show = step => {
    part("-frame").src = frames[step - 1];
    part("-caption").textContent = captions[step - 1];
    part("-step").value = step;
    Plotly.relayout("$name", {"shapes[0].x0": step, "shapes[0].x1": step});
  };
  part("-caption").textContent = captions[0];
  part("-step").addEventListener("input", event => show(Number(event.target.value)));
  part("").on("plotly_click", event => show(event.points[0].x));
})();
</script>""")


def film_part(level: str, episode: dict, facts: Sequence[str], expert_sizes: Sequence[Sequence[int]]) -> str:
    """
    HTML of an episode: a frame that a slider chooses, and a timeline under a strip of frames.

    Args:
        level (`str`): Its level.
        episode (`dict`): Its `seed` and `steps`, each with `action`, `phase`, `carried`, `entropy`, and `weights` by
            layer.
        facts (`Sequence[str]`): What stands under its mission, as text.
        expert_sizes (`Sequence[Sequence[int]]`): Sizes of the experts of each layer.
    """
    steps = episode["steps"][:MAX_FRAMES]
    frames, mission = render_episode(level, episode["seed"], [step["action"] for step in steps])
    captions = [
        f"step {number}: {step['action']} · phase {step['phase']} · carries {step['carried']} · "
        f"entropy of the actions {step['entropy']:.2f} nats"
        for number, step in enumerate(steps, start=1)
    ]
    facts = [*facts, f"the first {len(steps)} are shown"] if len(steps) < len(episode["steps"]) else facts
    name = identifier(f"film {level}")
    return _FILM.substitute(
        name=name,
        first=frames[0],
        mission=html.escape(mission),
        facts=html.escape(" · ".join(facts)),
        last=len(frames),
        timeline=plot(name, _timeline(frames, steps, expert_sizes)),
        frames=json.dumps(frames),
        captions=json.dumps(captions),
    )


def render_episode(level: str, seed: int, actions: Sequence[str]) -> tuple[list[str], str]:
    """The grid before each of the actions, PNG images as data URIs, and the mission."""
    environment = make_level(level)
    with without_rejections():
        environment.reset(seed=seed)
    # The larger the world, the smaller its cells.
    tile = max(10, 224 // max(environment.width, environment.height))
    frames = []
    for action in actions:
        file = io.BytesIO()
        Image.fromarray(environment.get_frame(tile_size=tile)).quantize(colors=48).save(file, "PNG", optimize=True)
        frames.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
        environment.step(environment.actions[action])
    return frames, environment.mission


def _timeline(frames: list[str], steps: list[dict], expert_sizes: Sequence[Sequence[int]]) -> dict:
    inner = _FRAMES_HEIGHT + _PHASE_HEIGHT + len(expert_sizes) * (_LAYER_HEIGHT + _GAP) + _GAP
    numbers = list(range(1, len(steps) + 1))
    xaxis = {"range": [0.5, len(steps) + 0.5], "tick0": 1, "dtick": math.ceil(len(steps) / 24), "anchor": "y"}
    layout = {"xaxis": xaxis | {"title": {"text": "step"}, "showgrid": False, "zeroline": False}}
    bar = {"type": "bar", "hovertemplate": "step %{x}: %{y:.2f}"}
    traces, top = [], inner - _FRAMES_HEIGHT - _GAP
    for layer, sizes in enumerate(expert_sizes):
        axis = {"domain": [(top - _LAYER_HEIGHT) / inner, top / inner], "range": [0, 1], "tickvals": [0, 1]}
        layout[f"yaxis{layer + 2}"] = axis | {"title": {"text": f"layer {layer}"}, "showgrid": False}
        top -= _LAYER_HEIGHT + _GAP
        for expert, colour in enumerate(expert_colours(sizes)):
            weights = [step["weights"][layer][expert] for step in steps]
            marker = {"color": colour, "line": {"width": 0}}
            own = {"x": numbers, "y": weights, "yaxis": f"y{layer + 2}", "marker": marker}
            traces.append(bar | own | {"name": expert_name(sizes, expert)} | legend_group(f"layer {layer}"))
    bar["hovertemplate"] = "step %{x}"
    for phase, colour in phase_colours([step["phase"] for step in steps]).items():
        x = [number for number, step in zip(numbers, steps, strict=True) if step["phase"] == phase]
        own = {"x": x, "y": [1] * len(x), "name": phase, "marker": {"color": colour, "line": {"width": 0}}}
        traces.append(bar | own | legend_group("bot's subgoal"))
    line = {"type": "line", "xref": "x", "yref": "paper", "x0": 1, "x1": 1, "y0": 0}
    layout |= {
        "yaxis": {"domain": [0, _PHASE_HEIGHT / inner], "range": [0, 1], "tickvals": [], "title": {"text": "phase"}},
        "images": _strip(frames, _FRAMES_HEIGHT / inner),
        "shapes": [line | {"y1": 1 - _FRAMES_HEIGHT / inner, "line": {"color": "#e15759", "width": 2}}],
        "legend": {"traceorder": "grouped"},
        "barmode": "stack",
        "bargap": 0,
        "height": inner + _MARGIN,
        "minwidth": 700,
        "margin": {"l": 60, "r": 10, "t": 5, "b": _MARGIN - 5},
    }
    return {"data": traces, "layout": LAYOUT | layout}


def _strip(frames: list[str], height: float) -> list[dict]:
    """Up to `_STRIP` frames above their steps."""
    number = min(_STRIP, len(frames))
    width = len(frames) / number
    place = {"xref": "x", "yref": "paper", "y": 1, "sizex": 0.96 * width, "sizey": height, "sizing": "contain"}
    place |= {"xanchor": "center", "yanchor": "top"}
    centres = [0.5 + width * (index + 0.5) for index in range(number)]
    return [place | {"x": centre, "source": frames[round(centre) - 1]} for centre in centres]


def expert_name(sizes: Sequence[int], expert: int) -> str:
    """What an expert of a layer is called in legends."""
    return f"size {sizes[expert]}" if sizes[expert] else "skip"


def expert_colours(sizes: Sequence[int]) -> list[str]:
    """A colour for each expert of a layer: the larger, the darker; grey for a skip."""
    order = sorted((index for index, size in enumerate(sizes) if size), key=lambda index: sizes[index])
    light, dark = np.array([198, 221, 240]), np.array([12, 54, 105])
    colours = [_GREY] * len(sizes)
    for position, index in enumerate(order):
        shade = light + (dark - light) * position / max(len(order) - 1, 1)
        colours[index] = "rgb({},{},{})".format(*shade.round().astype(int))
    return colours


def legend_group(name: str) -> dict:
    """The part of a legend that a trace belongs to."""
    return {"legendgroup": name, "legendgrouptitle": {"text": name}}


def phase_colours(phases: Sequence[str]) -> dict[str, str]:
    """A colour for each phase that occurs, the same in every episode."""
    names = [*_PHASES, *sorted({*phases} - {*_PHASES, NO_PHASE})]
    colours = dict(zip(names, (f"#{colour}" for colour in PALETTE.split()), strict=False)) | {NO_PHASE: _GREY}
    return {phase: colours[phase] for phase in dict.fromkeys(phases)}

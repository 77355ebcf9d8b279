"""A GIF of one episode: the grid as it is rendered, and beside it what each layer's router gives its experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..modeling import MopForActionPrediction
from .babyai import Episode, Observations
from .babyai_player import without_rejections
from .minigrid_fast_path import make_level
from .policy_actor import PolicyActor

_MARGIN, _BAR, _GAP, _TITLE = 10, 14, 4, 18
_PANEL = 260
_LINES = 3
_TILE = 24
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


@dataclass
class VideoFrame:
    """
    One step of an episode.

    Args:
        grid (`np.ndarray` of shape `(height, width, 3)`): The rendered grid, uint8.
        weights (`list[np.ndarray]`): For each layer, the weight of each expert.
        action (`str`): What is done next.
    """

    grid: np.ndarray
    weights: list[np.ndarray]
    action: str


def film_episode(policy: MopForActionPrediction, level: str, seed: int, path: str | Path) -> Episode:
    """
    Lets `policy` play an episode greedily and writes it as a GIF.

    Args:
        policy ([`MopForActionPrediction`]): In evaluation mode.
        level (`str`): The level.
        seed (`int`): Of the episode.
        path (`str` or `Path`): Of the file.
    """
    environment = make_level(level)
    with without_rejections():
        observation, _ = environment.reset(seed=seed)
    actor = PolicyActor(policy, with_routing=policy.config.is_routed)
    state, frames, total, done = policy.initial_state(1), [], 0.0, False
    while not done:
        fresh = np.array([not frames])
        actions, state = actor(Observations.from_dictionaries([observation]), fresh, state)
        action = environment.actions(actions.item())
        weights = [layer[0].cpu().numpy() for layer in actor.router_weights]
        frames.append(VideoFrame(environment.get_frame(tile_size=_TILE), weights, action.name))
        observation, reward, terminated, truncated, _ = environment.step(action)
        total += float(reward)
        done = terminated or truncated
    layers = policy.config.layers if policy.config.is_routed else []
    write_episode_video(frames, layers, environment.mission, path)
    return Episode(level, seed, total, len(frames), total > 0)


def write_episode_video(
    frames: Sequence[VideoFrame],
    layers: Sequence[Sequence[int]],
    mission: str,
    path: str | Path,
    milliseconds: int = 300,
) -> None:
    """
    Writes `frames` as a GIF.

    Args:
        frames (`Sequence[VideoFrame]`): Steps of the episode.
        layers (`Sequence[Sequence[int]]`): Sizes of the experts of each layer that has weights.
        mission (`str`): What the policy was told, printed above.
        path (`str` or `Path`): Of the file.
        milliseconds (`int`, *optional*, defaults to 300): How long each step is shown.
    """
    images = [_draw(frame, layers, mission, step, len(frames)) for step, frame in enumerate(frames)]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    durations = [milliseconds] * (len(images) - 1) + [4 * milliseconds]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def _draw(frame: VideoFrame, layers: Sequence[Sequence[int]], mission: str, step: int, steps: int) -> Image.Image:
    grid_height, grid_width = frame.grid.shape[:2]
    header = _MARGIN + _LINES * _TITLE
    panel = sum(_TITLE + len(sizes) * (_BAR + _GAP) + _MARGIN for sizes in layers)
    size = (grid_width + _PANEL + 3 * _MARGIN, header + max(grid_height, panel) + _MARGIN)
    image = Image.new("RGB", size, "white")
    image.paste(Image.fromarray(frame.grid), (_MARGIN, header))
    pen = ImageDraw.Draw(image)
    width = size[0] - 2 * _MARGIN
    for line, text in enumerate(
        [*_wrap(pen, mission, width)[: _LINES - 1], f"step {step + 1}/{steps}: {frame.action}"]
    ):
        pen.text((_MARGIN, _MARGIN / 2 + line * _TITLE), text, fill="black")
    top = header
    for layer, (sizes, weights) in enumerate(zip(layers, frame.weights, strict=True)):
        top = _draw_layer(pen, grid_width + 2 * _MARGIN, top, f"layer {layer}", sizes, weights)
    return image.quantize(colors=128)


def _draw_layer(
    pen: ImageDraw.ImageDraw, left: int, top: int, title: str, sizes: Sequence[int], weights: np.ndarray
) -> int:
    """Draws a bar for each expert, and returns where the next layer begins."""
    pen.text((left, top), title, fill="black")
    top += _TITLE
    longest = _PANEL - 100
    for expert, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        pen.text((left, top + 1), f"{size:>4}" if size else "skip", fill="black")
        start = left + 40
        pen.rectangle((start, top, start + longest, top + _BAR), outline="#bbbbbb")
        pen.rectangle((start, top, start + longest * float(weight), top + _BAR), fill=_COLOURS[expert % len(_COLOURS)])
        pen.text((start + longest + 6, top + 1), f"{weight:.2f}", fill="black")
        top += _BAR + _GAP
    return top + _MARGIN


def _wrap(pen: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines

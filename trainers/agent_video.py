"""A GIF of an episode: what the agent sees, and beside it the experts of each layer as they are used."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..modeling import TieredMoeForActorCritic
from .agent_evaluation import PlayedEpisodes
from .atari import GameEnvironments
from .game_rollout import GamePlayer

_SCALE, _MARGIN, _TITLE, _PANEL = 4, 10, 16, 300
# How fast the glow of an expert that is not used any more goes out, with each step.
_FADING = 0.8
ACTIONS = (
    "noop", "fire", "up", "right", "left", "down", "up right", "up left", "down right", "down left", "up fire",
    "right fire", "left fire", "down fire", "up right fire", "up left fire", "down right fire", "down left fire",
)  # fmt: skip


@torch.no_grad()
def film_agent(
    agent: TieredMoeForActorCritic,
    game: str,
    seed: int,
    path: str | Path,
    max_steps: int = 400,
    preprocessing: str = "current",
    tell_game: bool = True,
    deterministic: bool = False,
) -> PlayedEpisodes:
    """
    Lets an agent play an episode and writes it as a GIF.

    Args:
        agent ([`TieredMoeForActorCritic`]): In evaluation mode.
        game (`str`): One of its configuration.
        seed (`int`): Of game and actions.
        path (`str` or `Path`): Of the file.
        max_steps (`int`, *optional*, defaults to 400): Steps at most.
        preprocessing (`str`, *optional*): As of [`GameEnvironments`].
        tell_game (`bool`, *optional*), deterministic (`bool`, *optional*): As of [`play_episodes`].
    """
    number = agent.config.games.index(game)
    environments = GameEnvironments([game], 1, seed, preprocessing, 1)
    device = agent.action_head.weight.device
    generator = torch.Generator().manual_seed(seed)
    player = GamePlayer(agent, environments, torch.tensor([number]), generator, device)
    player.begin()
    glow = np.zeros((agent.config.num_layers, agent.config.num_experts))
    images, total = [], 0.0
    for step in range(max_steps):
        seen = player.memory.frames[0, -1].numpy()
        named = agent.config.games[agent.model.detector(player.memory.frames.to(device)).argmax()]
        result, experts = player.act(tell_game, deterministic)
        glow *= _FADING
        for layer, chosen in enumerate(experts):
            glow[layer, chosen.flatten().cpu().numpy()] = 1.0
        total += float(result.rewards[0])
        action = ACTIONS[int(player.memory.actions[0])]
        lines = [f"{game}, step {step + 1}: {action}", f"return {total:g}; detector: {named}"]
        images.append(_draw(seen, glow, lines))
        if result.over[0]:
            break
    environments.close()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=66, loop=0)
    return PlayedEpisodes(game, np.array([total]), np.array([len(images)]))


def _draw(seen: np.ndarray, glow: np.ndarray, lines: list[str]) -> Image.Image:
    side = _SCALE * len(seen)
    header = _MARGIN + _TITLE * len(lines)
    columns = int(np.ceil(np.sqrt(4 * glow.shape[1])))
    cell = max(2, min(16, _PANEL // columns))
    rows = -(-glow.shape[1] // columns)
    panel = len(glow) * (_TITLE + rows * cell + _MARGIN)
    size = (side + _PANEL + 3 * _MARGIN, header + max(side, panel) + _MARGIN)
    image = Image.new("RGB", size, "white")
    image.paste(Image.fromarray(seen).resize((side, side), Image.Resampling.NEAREST), (_MARGIN, header))
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN / 2 + number * _TITLE), line, fill="black")
    left, top = side + 2 * _MARGIN, header
    for layer, own in enumerate(glow):
        pen.text((left, top), f"layer {layer}", fill="black")
        top += _TITLE
        for expert, brightness in enumerate(own):
            row, column = divmod(expert, columns)
            corner = (left + column * cell, top + row * cell)
            shade = tuple(int(235 + (dark - 235) * brightness) for dark in (68, 119, 170))
            pen.rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), fill=shade)
        top += rows * cell + _MARGIN
    return image.quantize(colors=64)

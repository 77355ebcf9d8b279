"""Minigrid's BabyAI levels and their bot, several times faster, with the same observations and actions frame by frame.

A level keeps a map of what its cells look like, and updates it where the grid changes. An observation is then a
rotated window of that map, and what the agent sees follows from seven table look-ups, one per row of the view.
"""

import functools
import os

import numpy as np

# Minigrid imports pygame, which greets on import.
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
try:
    import minigrid
    from gymnasium import Env
    from gymnasium.envs.registration import load_env_creator, registry
    from minigrid.core.constants import DIR_TO_VEC
    from minigrid.envs.babyai.core.roomgrid_level import RejectSampling, RoomGridLevel
    from minigrid.utils.baby_ai_bot import BabyAIBot
except ImportError as error:
    raise ImportError('BabyAI needs gymnasium and minigrid: pip install "mixturekit[babyai]"') from error

from .minigrid_cell_map import EMPTY_CODE, STEPS, VIEW_SIZE, CellMap, MappedGrid
from .minigrid_fast_bot import FastBot

MINIGRID_VERSION = minigrid.__version__

_RIGHT_VEC = [np.array((-dy, dx)) for dx, dy in DIR_TO_VEC]


def babyai_levels() -> list[str]:
    """The ids of all BabyAI levels that minigrid has."""
    return sorted(name for name in registry if name.startswith("BabyAI-"))


def make_level(env_id: str, **kwargs) -> RoomGridLevel:
    """
    A level of BabyAI whose observations are computed fast.

    Args:
        env_id (`str`): The id of a level, such as `"BabyAI-GoToRedBall-v0"`.
        kwargs: Further arguments of the level. Where they ask for another view than 7 by 7 cells with walls that hide
            what is behind, minigrid's own methods compute it.

    Returns:
        [`FastLevel`]: An instance of the level's own class too.
    """
    spec = registry[env_id]
    return _fast_class(load_env_creator(spec.entry_point))(**{**spec.kwargs, **kwargs})


def make_bot(level: RoomGridLevel) -> BabyAIBot:
    """The bot for the current episode of a level: minigrid's own unless the level's observations are computed fast."""
    return FastBot(level) if isinstance(level, FastLevel) and level.has_fast_view else BabyAIBot(level)


@functools.cache
def _fast_class(level_class: type[RoomGridLevel]) -> type[RoomGridLevel]:
    return type(f"Fast{level_class.__name__}", (FastLevel, level_class), {"__module__": __name__})


class FastLevel(RoomGridLevel):
    """
    A level that keeps a [`CellMap`] of its grid. It comes first among the bases of a class, before the level.

    The map follows `grid.set` and the cell in front of the agent. Code that changes an object elsewhere in the grid,
    such as the state of a distant door, calls `gen_obs`, which draws the map anew.
    """

    cell_map: CellMap
    visible_rows: list[int]
    _is_stepping = False
    _integers: "_Integers | None" = None

    @property
    def has_fast_view(self) -> bool:
        """Whether this is the view that is computed fast."""
        return self.agent_view_size == VIEW_SIZE and not self.see_through_walls

    def step(self, action):
        """Takes an action. The arguments and results are minigrid's."""
        self._is_stepping = True
        try:
            return super().step(action)
        finally:
            self._is_stepping = False

    def gen_obs(self) -> dict:
        """The observation of the agent, as minigrid computes it."""
        if not self.has_fast_view:
            return super().gen_obs()
        x, y = map(int, self.agent_pos)
        direction = int(self.agent_dir)
        if self._is_stepping:
            # Opening a door changes the object and not the grid; an action reaches no further than this.
            dx, dy = STEPS[direction]
            self.cell_map.update(x + dx, y + dy, self.grid.get(x + dx, y + dy))
        else:
            self.cell_map = CellMap(self.grid)
            self.grid.__class__ = MappedGrid
            self.grid.cell_map = self.cell_map
        self.visible_rows = self.cell_map.visible_rows(x, y, direction)
        image = self.cell_map.image(x, y, direction, self.visible_rows)
        # The agent sees what it carries in its own cell.
        image[VIEW_SIZE // 2, VIEW_SIZE - 1] = self.carrying.encode() if self.carrying else EMPTY_CODE
        return {"image": image, "direction": self.agent_dir, "mission": self.mission}

    @property
    def dir_vec(self) -> np.ndarray:
        """The step forward."""
        return DIR_TO_VEC[self.agent_dir]

    @property
    def right_vec(self) -> np.ndarray:
        """The step to the right."""
        return _RIGHT_VEC[self.agent_dir]

    def get_view_coords(self, i: int, j: int) -> tuple[int, int]:
        """Column and row in the agent's view, which they may be outside of, of a cell."""
        x, y = i - int(self.agent_pos[0]), j - int(self.agent_pos[1])
        dx, dy = STEPS[self.agent_dir]
        return self.agent_view_size // 2 + dx * y - dy * x, self.agent_view_size - 1 - dx * x - dy * y

    def check_objs_reachable(self, raise_exc: bool = True) -> bool:
        """Whether the agent can reach all objects and doors without moving any. Raises `RejectSampling` if not."""
        width, cells = self.grid.width, self.grid.grid
        x, y = map(int, self.agent_pos)
        pending = [y * width + x]
        reached = bytearray(len(cells))
        reached[pending[0]] = 1
        # The border is all wall, so that no step leaves the grid.
        while pending:
            index = pending.pop()
            if cells[index] is None or cells[index].type == "door":
                for near in (index - 1, index + 1, index - width, index + width):
                    if not reached[near]:
                        reached[near] = 1
                        pending.append(near)
        missed = [
            (index % width, index // width)
            for index, cell in enumerate(cells)
            if cell is not None and not reached[index] and cell.type != "wall"
        ]
        if missed and raise_exc:
            raise RejectSampling(f"unreachable object at {min(missed)}")
        return not missed

    @property
    def np_random(self) -> np.random.Generator:
        """The generator of the level."""
        if self._integers:
            self._integers.give_back()
            self._integers = None
        return super().np_random

    @np_random.setter
    def np_random(self, generator: np.random.Generator) -> None:
        Env.np_random.fset(self, generator)

    def _rand_int(self, low: int, high: int) -> int:
        if self._integers is None or self._integers.generator is not self._np_random:
            generator = self.np_random
            if not _Integers.match(type(generator.bit_generator)):
                return generator.integers(low, high)
            self._integers = _Integers(generator)
        return self._integers.draw(low, high)

    def _rand_bool(self) -> bool:
        return self._rand_int(0, 2) == 0


class _Integers:
    """
    The integers that `generator.integers(low, high)` would return one by one, for less. Drawing those is half of what
    a reset costs.

    Numpy takes 64 bits at a time and keeps the upper half for the next draw. So does this, which therefore gives that
    half back before anyone else uses the generator. They are numpy's integers because levels compare them by `is`.
    """

    def __init__(self, generator: np.random.Generator):
        self.generator = generator
        state = generator.bit_generator.state
        self._has_half, self._half = state["has_uint32"], state["uinteger"]

    def give_back(self) -> None:
        """Leave the generator as its own method would have left it."""
        bits = self.generator.bit_generator
        bits.state = {**bits.state, "has_uint32": self._has_half, "uinteger": self._half}

    def draw(self, low: int, high: int) -> np.int64:
        """An integer from `low` to `high - 1`."""
        count = int(high) - int(low)
        if not 0 < count < 1 << 32:
            raise ValueError(f"high is {high}: choose a number above {low}, and less than 2**32 above.")
        if count == 1:
            return np.int64(low)
        # Lemire's method: the upper half of a product, unless its lower half is among the few that would be unfair.
        product = self._next() * count
        if product & 0xFFFFFFFF < count:
            unfair = ((1 << 32) - count) % count
            while product & 0xFFFFFFFF < unfair:
                product = self._next() * count
        return np.int64(low + (product >> 32))

    def _next(self) -> int:
        self._has_half = 1 - self._has_half
        if not self._has_half:
            return self._half
        bits = self.generator.bit_generator.random_raw()
        self._half = bits >> 32
        return bits & 0xFFFFFFFF

    @staticmethod
    @functools.cache
    def match(bit_generator: type[np.random.BitGenerator]) -> bool:
        """Whether this numpy draws alike. It keeps the right to draw otherwise in another version (NEP 19)."""
        if bit_generator is not np.random.PCG64:
            return False
        ours, theirs = (np.random.Generator(bit_generator(0)) for _ in range(2))
        integers = _Integers(ours)
        pairs = [(integers.draw(0, high), theirs.integers(0, high)) for high in [2, 3, 6, 22, 1000, 3 << 30] * 50]
        same = all(our == their and type(our) is type(their) for our, their in pairs)
        integers.give_back()
        return same and ours.bit_generator.state == theirs.bit_generator.state

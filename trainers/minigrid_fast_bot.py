"""Minigrid's bot for BabyAI, with its own plans and rules, which sees and searches faster.

It reuses the visibility of the observation, and all its searches from one place share one breadth-first flood. Cells
are numbered over the padded map of the level: `cell = (x + MARGIN) * stride + y + MARGIN`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from minigrid.utils.baby_ai_bot import BabyAIBot

from .minigrid_cell_map import BLOCKER, COLUMNS, FREE, MARGIN, STEPS, VIEW_SIZE

MAX_REPLANS = 200


class EndlessPlanError(Exception):
    """The bot changed its plan `MAX_REPLANS` times without an action: on some levels it would do so for ever."""


class FastBot(BabyAIBot):
    """
    Minigrid's bot with its own plans and rules, which sees and searches faster, and does not replan for ever.

    Args:
        level ([`~minigrid_fast_path.FastLevel`]): The level, at the start of an episode.
    """

    def __init__(self, level: RoomGridLevel):
        super().__init__(level)
        self._layout = _layout(level.grid.width, level.grid.height)
        self._seen = bytearray(len(level.cell_map.kinds))
        self.vis_mask = _SeenCells(self._seen, level.cell_map.stride)
        self._near_flood = self._far_flood = None

    def replan(self, action_taken: int | None = None) -> int:
        """
        The action that the bot suggests, given the one taken since it was last asked, `None` at first.

        Raises [`EndlessPlanError`] where minigrid's bot would not return, and whatever that bot raises.
        """
        self._process_obs()
        self._near_flood = self._far_flood = None
        self._check_erroneous_box_opening(action_taken)
        self._update_subgoals()
        if self.stack:
            self.stack[-1].replan_after_action(action_taken)
        while self.stack and self.stack[-1].is_exploratory():
            self.stack.pop()
        action = self._replan_subgoals()
        self._remember_current_state()
        return action

    def _replan_subgoals(self) -> int:
        for _ in range(MAX_REPLANS):
            if not self.stack:
                return self.mission.actions.done
            action = self.stack[-1].replan_before_action()
            if action is not None:
                return action
        raise EndlessPlanError(f"no action after changing the plan {MAX_REPLANS} times")

    def _update_subgoals(self) -> None:
        level = self.mission
        attributes = {
            "pos": np.array(level.agent_pos),
            "dir_vec": level.dir_vec,
            "right_vec": level.right_vec,
            "carrying": level.carrying,
        }
        attributes["fwd_pos"] = attributes["pos"] + attributes["dir_vec"]
        attributes["fwd_cell"] = level.grid.get(*attributes["fwd_pos"].tolist())
        for subgoal in self.stack:
            vars(subgoal).update(attributes)

    def _process_obs(self) -> None:
        """Mark what the agent sees now as seen."""
        level, seen = self.mission, self._seen
        x, y = map(int, level.agent_pos)
        dx, dy = STEPS[level.agent_dir]
        stride = self._layout.stride
        forward, right = dx * stride + dy, dx - dy * stride
        first = (x + MARGIN) * stride + y + MARGIN - (VIEW_SIZE // 2) * right
        for columns in level.visible_rows:
            for column in COLUMNS[columns]:
                seen[first + column * right] = 1
            first += forward

    def _shortest_path(self, accept_fn: Callable, try_with_blockers: bool = False) -> tuple:
        """The path to the first accepted cell, this cell, and whether blockers were moved aside on the way."""
        level, layout = self.mission, self._layout
        if self._near_flood is None:
            x, y = map(int, level.agent_pos)
            start = ((x + MARGIN) * layout.stride + y + MARGIN, layout.moves[level.agent_dir])
            self._near_flood = _Flood([start], self._seen, level.cell_map.kinds, FREE)
        path = self._find(self._near_flood, accept_fn)
        with_blockers = path is None and try_with_blockers
        if with_blockers:
            if self._far_flood is None:
                starts = [(cell, layout.moves[0]) for cell in self._near_flood.found]
                self._far_flood = _Flood(starts, self._seen, level.cell_map.kinds, BLOCKER)
            path = self._find(self._far_flood, accept_fn)
            if path:
                path = self._near_flood.path_to(path[0])[:-1] + path
        if path is None:
            return None, None, with_blockers
        places = [layout.places[cell] for cell in path]
        return places[1:], places[-1], with_blockers

    def _find(self, flood: "_Flood", accept_fn: Callable) -> list[int] | None:
        places, indices, cells = self._layout.places, self._layout.indices, self.mission.grid.grid
        for wave in flood.waves():
            for cell in wave:
                if accept_fn(places[cell], cells[indices[cell]]):
                    return flood.path_to(cell)
        return None


class _SeenCells:
    """The cells that a bot has seen, indexed by `(x, y)`."""

    def __init__(self, seen: bytearray, stride: int):
        self._seen, self._stride = seen, stride

    def __getitem__(self, position: tuple[int, int]) -> int:
        return self._seen[(position[0] + MARGIN) * self._stride + position[1] + MARGIN]


class _Flood:
    """
    The cells that a breadth-first search comes to, in its order, found as far as they are asked for and kept.

    It goes straight on first, and expands cells that have been seen and are no worse to walk than `limit`.
    """

    def __init__(self, starts: list[tuple[int, list]], seen: bytearray, kinds: bytearray, limit: int):
        self.found = [cell for cell, _ in starts]
        self._previous: dict[int, int | None] = dict.fromkeys(self.found)
        self._edge = starts
        self._seen, self._kinds, self._limit = seen, kinds, limit

    def waves(self) -> Iterator[list[int]]:
        """All cells in their order, some at a time."""
        wave = self.found
        while wave:
            yield wave
            known = len(self.found)
            self._expand()
            wave = self.found[known:]

    def _expand(self) -> None:
        seen, kinds, limit, found, previous = self._seen, self._kinds, self._limit, self.found, self._previous
        edge = []
        for cell, moves in self._edge:
            if seen[cell] and kinds[cell] <= limit:
                for step, moves_after in moves:
                    near = cell + step
                    if near not in previous:
                        previous[near] = cell
                        found.append(near)
                        edge.append((near, moves_after))
        self._edge = edge

    def path_to(self, cell: int) -> list[int]:
        """The cells from a start to this one, both included."""
        path = [cell]
        while (cell := self._previous[cell]) is not None:
            path.append(cell)
        return path[::-1]


class _Layout:
    """What the maps of one size share: the place of each cell, its index in `Grid.grid`, and the steps of a search."""

    def __init__(self, width: int, height: int):
        self.stride = height + 2 * MARGIN
        self.places = [
            (x - MARGIN, y - MARGIN)
            for x, y in itertools.product(range(width + 2 * MARGIN), range(height + 2 * MARGIN))
        ]
        self.indices = [y * width + x for x, y in self.places]
        # The steps after one in each direction, in the order in which the bot tries them.
        self.moves: list[list] = [[] for _ in STEPS]
        for moves, (dx, dy) in zip(self.moves, STEPS, strict=True):
            for step in ((dx, dy), (dy, dx), (-dy, -dx), (-dx, -dy)):
                moves.append((step[0] * self.stride + step[1], self.moves[STEPS.index(step)]))


@functools.lru_cache(maxsize=64)
def _layout(width: int, height: int) -> _Layout:
    return _Layout(width, height)

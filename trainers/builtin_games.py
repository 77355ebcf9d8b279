"""Six small games that look and play unlike each other, with the interface of ale-py's vector environment.

They need no ROM and no emulator, run tens of thousands of steps a second, and a small agent learns each in a few
minutes on one core. Their state can be saved, which ale-py's cannot.

Shapes: envs; a frame is 84 by 84 pixels, drawn as 12 by 12 cells of 7 by 7.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

# What each of the 18 actions of ALE does to the joystick: to the right, down, and the button.
RIGHT = np.array([0, 0, 0, 1, -1, 0, 1, -1, 1, -1, 0, 1, -1, 0, 1, -1, 1, -1])
DOWN = np.array([0, 0, -1, 0, 0, 1, -1, -1, 1, 1, -1, 0, 0, 1, -1, -1, 1, 1])
FIRE = np.array([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], dtype=bool)
CELLS, PIXELS, STACK = 12, 7, 4
SIDE = CELLS * PIXELS


class BuiltinGame(VectorEnv, ABC):
    """
    Several copies of a game, with the last four frames as observation and SAME_STEP autoreset.

    A game says what is in its cells (`draw`), how an episode begins (`begin`) and what an action does (`advance`). An
    episode is truncated after `max_steps`; `info["final_obs"]` then has the frames `(envs, 4, 84, 84)` that it ended
    with, in the rows of the episodes that ended.

    Args:
        num_envs (`int`): Copies.
        repeat_action_probability (`float`, *optional*, defaults to 0.0): Probability that the last action is repeated
            in place of the new one, as ALE's sticky actions.
    """

    # Actions that do something, by their number in ALE's full set.
    actions: tuple[int, ...]
    max_steps = 128
    # A return that shows that the game is mastered.
    solved_return: float
    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int, repeat_action_probability: float = 0.0):
        self.num_envs = num_envs
        self.repeat_action_probability = repeat_action_probability
        self.single_observation_space = Box(0, 255, (STACK, SIDE, SIDE), np.uint8)
        self.single_action_space = Discrete(len(RIGHT))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.random = np.random.default_rng(0)
        self.fields: dict[str, np.ndarray] = {}
        for name in ("steps", "last_action", *self.begin(np.arange(num_envs))):
            self.fields[name] = np.zeros(num_envs, dtype=np.int64)
        self._frames = np.zeros((num_envs, STACK, SIDE, SIDE), dtype=np.uint8)
        self._background = self.background().astype(np.uint8)

    @abstractmethod
    def begin(self, rows: np.ndarray) -> dict[str, np.ndarray | int]:
        """The fields of new episodes in `rows`; the same names each time."""

    @abstractmethod
    def advance(self, right: np.ndarray, down: np.ndarray, fire: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rewards, and which episodes have ended, `(envs,)`, after moves by -1, 0 or 1 and the button."""

    @abstractmethod
    def draw(self, cells: np.ndarray) -> None:
        """Puts the brightness of what is there into `cells` `(envs, 12, 12)`; 0 is background."""

    @abstractmethod
    def background(self) -> np.ndarray:
        """What is behind it, `(84, 84)`."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begins all episodes anew; `seed` decides all that is random from now on."""
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self._begin(np.arange(self.num_envs))
        return self._frames.copy(), self._info()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Frames uint8 `(envs, 4, 84, 84)`, rewards int32, terminations and truncations `(envs,)`, and info."""
        fields = self.fields
        if self.repeat_action_probability > 0:
            repeated = self.random.random(self.num_envs) < self.repeat_action_probability
            actions = np.where(repeated, fields["last_action"], actions)
        fields["last_action"][:] = actions
        rewards, terminated = self.advance(RIGHT[actions], DOWN[actions], FIRE[actions])
        fields["steps"] += 1
        truncated = (fields["steps"] >= self.max_steps) & ~terminated
        self._frames[:, :-1] = self._frames[:, 1:]
        self._frames[:, -1] = self._render()
        info = self._info()
        rows = np.flatnonzero(terminated | truncated)
        if len(rows):
            info["final_obs"] = self._frames.copy()
            self._begin(rows)
        return self._frames.copy(), rewards.astype(np.int32), terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        """All of it: arrays, and the state of the generator under `random`."""
        fields = {f"field.{name}": value.copy() for name, value in self.fields.items()}
        return {**fields, "frames": self._frames.copy(), "random": self.random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where [`~BuiltinGame.state_dict`] was taken."""
        for name, value in self.fields.items():
            value[:] = state[f"field.{name}"]
        self._frames[:] = state["frames"]
        self.random.bit_generator.state = state["random"]

    def _begin(self, rows: np.ndarray) -> None:
        for name, value in {"steps": 0, "last_action": 0, **self.begin(rows)}.items():
            self.fields[name][rows] = value
        # As ALE: the first frame stands in for those before it.
        self._frames[rows] = self._render()[rows, None]

    def _render(self) -> np.ndarray:
        cells = np.zeros((self.num_envs, CELLS, CELLS), dtype=np.uint8)
        self.draw(cells)
        pixels = cells.repeat(PIXELS, axis=1).repeat(PIXELS, axis=2)
        return np.where(pixels > 0, pixels, self._background)

    def _info(self) -> dict[str, np.ndarray]:
        return {"lives": np.zeros(self.num_envs, dtype=np.int32)}

    def _any(self, high: int, rows: np.ndarray) -> np.ndarray:
        return self.random.integers(0, high, len(rows))

    @property
    def _rows(self) -> np.ndarray:
        return np.arange(self.num_envs)


class Catch(BuiltinGame):
    """Fruit falls, and a basket of three cells moves below it: 1 for each that is caught, -1 for each that is not."""

    actions, solved_return, max_steps = (0, 3, 4), 8.0, 110

    def begin(self, rows):
        """Fruit at the top, the basket in the middle."""
        return {"fruit_x": self._any(CELLS, rows), "fruit_y": 0, "basket": CELLS // 2}

    def advance(self, right, down, fire):
        """The fruit falls by a cell."""
        f = self.fields
        f["basket"][:] = np.clip(f["basket"] + right, 1, CELLS - 2)
        f["fruit_y"] += 1
        landed = f["fruit_y"] == CELLS - 1
        rewards = landed * np.where(np.abs(f["fruit_x"] - f["basket"]) <= 1, 1, -1)
        rows = np.flatnonzero(landed)
        f["fruit_y"][rows], f["fruit_x"][rows] = 0, self._any(CELLS, rows)
        return rewards, np.zeros_like(landed)

    def draw(self, cells):
        """A bright fruit, and the basket in the last row."""
        f = self.fields
        for offset in (-1, 0, 1):
            cells[self._rows, CELLS - 1, f["basket"] + offset] = 180
        cells[self._rows, f["fruit_y"], f["fruit_x"]] = 255

    def background(self):
        """Night."""
        return np.full((SIDE, SIDE), 16)


class Tunnel(BuiltinGame):
    """Walls with a gap of three cells come down: 1 for each that is passed, -1 for each that is hit."""

    actions, solved_return, max_steps = (0, 3, 4), 13.0, 120

    def begin(self, rows):
        """A wall at the top, the car in the middle."""
        return {"gap": 1 + self._any(CELLS - 2, rows), "wall_y": 0, "car": CELLS // 2}

    def advance(self, right, down, fire):
        """The wall comes nearer by a cell."""
        f = self.fields
        f["car"][:] = np.clip(f["car"] + right, 0, CELLS - 1)
        f["wall_y"] += 1
        here = f["wall_y"] == CELLS - 4
        rewards = here * np.where(np.abs(f["car"] - f["gap"]) <= 1, 1, -1)
        rows = np.flatnonzero(here)
        f["wall_y"][rows], f["gap"][rows] = 0, 1 + self._any(CELLS - 2, rows)
        return rewards, np.zeros_like(here)

    def draw(self, cells):
        """A wall across the screen, and a dark car."""
        f, columns = self.fields, np.arange(CELLS)
        wall = np.abs(columns - f["gap"][:, None]) > 1
        cells[self._rows, f["wall_y"]] = np.where(wall, 250, 0)
        cells[self._rows, CELLS - 4, f["car"]] = 1
        cells[self._rows, CELLS - 3, f["car"]] = 1

    def background(self):
        """Upright stripes."""
        return np.tile(np.where(np.arange(SIDE) // 6 % 2, 90, 140), (SIDE, 1))


class Shoot(BuiltinGame):
    """A target flies by, a cannon moves below it: 1 for each shot that hits. Loading takes four steps."""

    actions, solved_return, max_steps = (0, 1, 3, 4, 11, 12), 16.0, 128

    def begin(self, rows):
        """The cannon in the middle, loaded."""
        return {"target": self._any(CELLS, rows), "speed": 2 * self._any(2, rows) - 1, "cannon": CELLS // 2,
                "loading": 0, "shot": -1}  # fmt: skip

    def advance(self, right, down, fire):
        """The target moves every other step; a shot hits at once."""
        f = self.fields
        f["cannon"][:] = np.clip(f["cannon"] + right, 0, CELLS - 1)
        shoots = fire & (f["loading"] == 0)
        f["shot"][:] = np.where(shoots, f["cannon"], -1)
        f["loading"][:] = np.where(shoots, 4, np.maximum(f["loading"] - 1, 0))
        hits = shoots & (np.abs(f["cannon"] - f["target"]) <= 1)
        moves = f["steps"] % 2 == 0
        bounces = moves & ((f["target"] + f["speed"] < 0) | (f["target"] + f["speed"] >= CELLS))
        f["speed"][bounces] *= -1
        f["target"] += np.where(moves, f["speed"], 0)
        rows = np.flatnonzero(hits)
        f["target"][rows] = self._any(CELLS, rows)
        return hits.astype(np.int64), np.zeros_like(hits)

    def draw(self, cells):
        """A target of three cells near the top, and a beam where a shot was fired."""
        f = self.fields
        for offset in (-1, 0, 1):
            cells[self._rows, 1, np.clip(f["target"] + offset, 0, CELLS - 1)] = 255
        fired = np.flatnonzero(f["shot"] >= 0)
        cells[fired, 2 : CELLS - 1, f["shot"][fired]] = 120
        cells[self._rows, CELLS - 1, f["cannon"]] = np.where(f["loading"] > 0, 160, 220)

    def background(self):
        """A fine chequerboard."""
        rows, columns = np.indices((SIDE, SIDE)) // 3
        return np.where((rows + columns) % 2, 60, 20)


class Collect(BuiltinGame):
    """A walker on four by four places collects pellets, one at a time: 1 for each."""

    actions, solved_return, max_steps = (0, 2, 3, 4, 5), 24.0, 96

    def begin(self, rows):
        """Walker and pellet anywhere."""
        return {name: self._any(4, rows) for name in ("x", "y", "pellet_x", "pellet_y")}

    def advance(self, right, down, fire):
        """The walker takes a step."""
        f = self.fields
        f["x"][:], f["y"][:] = np.clip(f["x"] + right, 0, 3), np.clip(f["y"] + down, 0, 3)
        found = (f["x"] == f["pellet_x"]) & (f["y"] == f["pellet_y"])
        rows = np.flatnonzero(found)
        # Elsewhere, or standing still would find it again.
        place = (4 * f["y"][rows] + f["x"][rows] + 1 + self._any(15, rows)) % 16
        f["pellet_y"][rows], f["pellet_x"][rows] = place // 4, place % 4
        return found.astype(np.int64), np.zeros_like(found)

    def draw(self, cells):
        """Dark on bright: the walker a square of nine cells, the pellet a bar of three."""
        f = self.fields
        for x, y, shade, rows in (("x", "y", 1, (0, 1, 2)), ("pellet_x", "pellet_y", 90, (1,))):
            for row in rows:
                for column in (0, 1, 2):
                    cells[self._rows, 3 * f[y] + row, 3 * f[x] + column] = shade

    def background(self):
        """Day."""
        return np.full((SIDE, SIDE), 220)


class Rally(BuiltinGame):
    """A ball bounces off three walls, a bat of five cells guards the fourth: 1 for each return, -1 for each miss."""

    actions, solved_return, max_steps = (0, 2, 5), 4.0, 110

    def begin(self, rows):
        """The ball at the far wall, the bat in the middle."""
        return {"x": 0, "y": self._any(CELLS, rows), "right": 1, "down": self._any(3, rows) - 1, "bat": CELLS // 2}

    def advance(self, right, down, fire):
        """Ball and bat move by a cell."""
        f = self.fields
        f["bat"][:] = np.clip(f["bat"] + down, 2, CELLS - 3)
        f["down"][(f["y"] + f["down"] < 0) | (f["y"] + f["down"] >= CELLS)] *= -1
        f["y"] += f["down"]
        f["x"] += f["right"]
        f["right"][f["x"] <= 0] = 1
        arrived = f["x"] == CELLS - 1
        returned = arrived & (np.abs(f["y"] - f["bat"]) <= 2)
        missed = arrived & ~returned
        rows = np.flatnonzero(returned)
        f["right"][rows], f["down"][rows] = -1, self._any(3, rows) - 1
        rows = np.flatnonzero(missed)
        f["x"][rows], f["y"][rows], f["down"][rows] = 0, self._any(CELLS, rows), self._any(3, rows) - 1
        return returned.astype(np.int64) - missed, np.zeros_like(arrived)

    def draw(self, cells):
        """The bat at the right, and the ball."""
        f = self.fields
        for offset in range(-2, 3):
            cells[self._rows, f["bat"] + offset, CELLS - 1] = 230
        cells[self._rows, f["y"], f["x"]] = 255

    def background(self):
        """Lying stripes."""
        return np.tile(np.where(np.arange(SIDE) // 7 % 2, 110, 70)[:, None], (1, SIDE))


class Signal(BuiltinGame):
    """One side of the screen lights up, another one with each step: 1 for moving there."""

    actions, solved_return, max_steps = (0, 2, 3, 4, 5), 50.0, 64

    def begin(self, rows):
        """Any side."""
        return {"side": self._any(4, rows)}

    def advance(self, right, down, fire):
        """A diagonal move is none there."""
        side = self.fields["side"]
        correct = (right == np.array([0, 1, 0, -1])[side]) & (down == np.array([-1, 0, 1, 0])[side])
        side[:] = (side + 1 + self._any(3, self._rows)) % 4
        return correct.astype(np.int64), np.zeros_like(correct)

    def draw(self, cells):
        """A bar along the side."""
        for number, (rows, columns) in enumerate(
            (
                (slice(0, 2), slice(2, -2)),
                (slice(2, -2), slice(-2, None)),
                (slice(-2, None), slice(2, -2)),
                (slice(2, -2), slice(0, 2)),
            )  # fmt: skip
        ):
            cells[self.fields["side"] == number, rows, columns] = 255

    def background(self):
        """Rings."""
        rows, columns = np.indices((SIDE, SIDE)) - SIDE // 2
        return 40 + 60 * (np.hypot(rows, columns) // 6 % 2)


BUILTIN_GAMES: dict[str, type[BuiltinGame]] = {
    "catch": Catch,
    "tunnel": Tunnel,
    "shoot": Shoot,
    "collect": Collect,
    "rally": Rally,
    "signal": Signal,
}

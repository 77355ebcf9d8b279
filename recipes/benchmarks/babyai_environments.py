"""Frames of BabyAI per second of processor time on one core, with the bot: minigrid's own against mixturekit's path.

python recipes/benchmarks/babyai_environments.py

Both play the same episodes, whose resets count too, one after the other in each repeat, so that other load meets both;
the best repeat of each is shown. The actions are the bot's, and random ones with `--random_actions`. On Unlock and
UnlockToUnlock, minigrid's own bot may not come to an end.
"""

import argparse
import contextlib
import io
import json
import random
import time
from collections.abc import Callable

LEVELS = ("GoToRedBall", "GoToLocal", "PutNextLocal", "UnlockPickup", "GoTo", "BossLevel")


def main() -> None:
    """Plays every level both ways, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", default=LEVELS, help="names without BabyAI- and -v0")
    parser.add_argument("--num_envs", type=int, default=16, help="environments that take turns")
    parser.add_argument("--steps", type=int, default=100, help="steps of each environment in a repeat")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--random_actions", type=float, default=0.0, help="share of random actions, 0 to 1")
    parser.add_argument("--output", default=None, help="JSON file for the figures")
    arguments = parser.parse_args()

    import gymnasium
    from minigrid.utils.baby_ai_bot import BabyAIBot

    from mixturekit.trainers.minigrid_fast_path import MINIGRID_VERSION, make_bot, make_level

    ways = {
        "minigrid": (lambda env_id: gymnasium.make(env_id, disable_env_checker=True).unwrapped, BabyAIBot),
        "mixturekit": (make_level, make_bot),
    }
    rows = []
    for level in arguments.levels:
        env_id = f"BabyAI-{level}-v0"
        seconds = {way: [] for way in ways}
        actions = set()
        for _ in range(arguments.repeats):
            for way, makers in ways.items():
                spent, taken = play(env_id, *makers, arguments)
                seconds[way].append(spent)
                actions.add(taken)
        if len(actions) > 1:
            raise SystemExit(f"{env_id}: the two ways differ in their actions.")
        frames = arguments.num_envs * arguments.steps
        rates = {way: frames / min(times) for way, times in seconds.items()}
        rows.append({"level": level, **rates, "ratio": rates["mixturekit"] / rates["minigrid"]})
    print_table(rows, MINIGRID_VERSION, arguments)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


def play(env_id: str, make_level: Callable, make_bot: Callable, arguments) -> tuple[float, tuple[int, ...]]:
    """The seconds that the environments take, and the actions taken in them."""
    rng = random.Random(0)
    seeds = iter(range(10**6))
    levels = [make_level(env_id) for _ in range(arguments.num_envs)]
    bots, lasts, taken = [None] * len(levels), [None] * len(levels), []
    start = time.process_time()
    for _ in range(arguments.steps):
        for index, level in enumerate(levels):
            if bots[index] is None:
                # Standard output, because minigrid prints the missions that it draws anew.
                with contextlib.redirect_stdout(io.StringIO()):
                    level.reset(seed=next(seeds))
                bots[index], lasts[index] = make_bot(level), None
            try:
                action = int(bots[index].replan(lasts[index]))
            except Exception:  # The bot gives up, for instance when a random action opened a box.
                bots[index] = None
                continue
            if rng.random() < arguments.random_actions:
                action = rng.randrange(7)
            _, _, terminated, truncated, _ = level.step(action)
            lasts[index] = action
            taken.append(action)
            if terminated or truncated:
                bots[index] = None
    return time.process_time() - start, tuple(taken)


def print_table(rows: list[dict], version: str, arguments) -> None:
    """Prints the frames per second of both, and their ratio."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Frames per CPU second with bot, {arguments.num_envs} environments")
    for column in ("level", f"minigrid {version}", "mixturekit", "ratio"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for row in rows:
        table.add_row(row["level"], f"{row['minigrid']:,.0f}", f"{row['mixturekit']:,.0f}", f"{row['ratio']:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

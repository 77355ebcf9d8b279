"""Replays the accesses of a run against every eviction policy, and against the best that any could do (Belady).

python recipes/benchmarks/expert_cache.py --trace trace.jsonl --fast_capacity 16 32 64

A trace is what a training recipe writes with `--nvme_path ... --store_trace trace.jsonl`. Without one, accesses of
specialised routes are drawn: each task has a subset of the experts, uses some more than others, and seldom one that is
not its own; batches of acting, which need few experts, alternate with batches of learning, which need many.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path


def main() -> None:
    """Replays the trace for every policy and capacity, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", help="a file of `store_trace`; drawn if unset")
    parser.add_argument("--fast_capacity", nargs="+", type=int, default=[32, 64, 160], help="experts per layer")
    parser.add_argument("--shared_pool", action="store_true", help="one tier for all layers")
    for name, default, text in (
        ("experts", 256, "experts of the one layer"), ("tasks", 10, "tasks, one after the other"),
        ("subset", 48, "experts of a task"), ("steps", 80, "batches of a task"),
        ("acting", 12, "tokens of a batch of acting"), ("learning", 64, "tokens of a batch of learning"),
        ("seed", 0, "seed"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}, of what is drawn")
    parser.add_argument("--leak", type=float, default=0.01, help="share of tokens that leave the subset")
    parser.add_argument("--json", help="file to write the figures to as well")
    arguments = parser.parse_args()
    if arguments.trace and not Path(arguments.trace).is_file():
        sys.exit(
            f"FileNotFoundError: there is no trace {arguments.trace}; train with --store_trace {arguments.trace}."
        )
    accesses = read_trace(arguments.trace) if arguments.trace else list(draw_trace(arguments))
    figures = replay(accesses, arguments.fast_capacity, arguments.shared_pool)
    print_table(figures)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), **figures}, indent=2) + "\n")


def read_trace(path: str) -> list[tuple]:
    """Task, layer and experts of every access in a file of `store_trace`."""
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [(line["task"], line["layer"], line["experts"]) for line in lines]


def draw_trace(arguments: argparse.Namespace) -> Iterator[tuple]:
    """Accesses of specialised routes; every fifth batch is one of learning."""
    chance = random.Random(arguments.seed)
    for task in range(arguments.tasks):
        subset = chance.sample(range(arguments.experts), arguments.subset)
        weights = [(rank + 1) ** -0.5 for rank in range(arguments.subset)]
        for step in range(arguments.steps):
            used = set()
            for _ in range(arguments.learning if step % 5 == 4 else arguments.acting):
                leaves = chance.random() < arguments.leak
                used.add(chance.randrange(arguments.experts) if leaves else chance.choices(subset, weights)[0])
            yield task, 0, sorted(used)


def replay(accesses: list[tuple], capacities: list[int], shared: bool) -> dict:
    """Hit rates of every policy and of the optimum, by capacity, and what a batch of one layer needs."""
    from mixturekit.modeling.expert_policies import POLICIES, optimal_hits, replay_hits

    pools: dict[int, list] = {}
    for task, layer, experts in accesses:
        pools.setdefault(0 if shared else layer, []).append((task, [(layer, expert) for expert in experts]))
    total = sum(len(experts) for _, _, experts in accesses)
    sizes = sorted(len(experts) for _, _, experts in accesses)
    rates = {}
    for capacity in capacities:
        best = sum(optimal_hits([batch for _, batch in pool], capacity) for pool in pools.values())
        rates[capacity] = {"optimum": best / total}
        for name, build in POLICIES.items():
            hits = 0
            for pool in pools.values():
                policy = build(capacity)
                hits += replay_hits(announced(pool, policy), policy, capacity)
            rates[capacity][name] = hits / total
    return {"accesses": total, "median_batch": sizes[len(sizes) // 2], "largest_batch": sizes[-1], "hit_rates": rates}


def announced(pool: list[tuple], policy) -> Iterator[list]:
    """The batches of a pool; the policy hears of the task of each."""
    for task, batch in pool:
        policy.set_task(task)
        yield batch


def print_table(figures: dict) -> None:
    """A line per capacity, each policy with its share of the optimum."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Hits of {figures['accesses']} accesses; a batch needs {figures['median_batch']} experts of a layer, "
        f"at most {figures['largest_batch']}: a tier with fewer cannot have them all, whatever the policy"
    )
    rates = figures["hit_rates"]
    names = list(next(iter(rates.values())))
    for column in ("experts in memory", *names):
        table.add_column(column, justify="right")
    for capacity, row in rates.items():
        shares = [f"{100 * row[name]:.1f} % ({100 * row[name] / max(row['optimum'], 1e-9):.1f})" for name in names[1:]]
        table.add_row(str(capacity), f"{100 * row['optimum']:.1f} %", *shares)
    Console(width=130).print(table)
    print("In brackets: of the optimum's hits.")


if __name__ == "__main__":
    main()

"""How fast experts on disk are: against the disk itself, experts in memory, DeepSpeed ZeRO-3 on NVMe, and accelerate.

python recipes/benchmarks/expert_store.py --folder /nvme/scratch --threads 1

First come the limits of the machine, then the rate of the store's disk tier, then training steps of one MoE on the
same batches and routes. Each measurement runs in a process of its own, and its bytes are what the kernel moved for it.
The tokens of a task go to the same few experts of each layer, and every few steps another task is on, in turn. Each of
them has been on before the measurement begins, so that its experts come from the disk with moments of their own.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

MIB = 2**20
COLUMNS = ("median s", "mean s", "of memory", "MB read", "MB written", "hits", "waiting s")


def main() -> None:
    """Measures everything that is installed, and prints a table for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where to write, on the disk to be measured")
    for name, default in {
        "hidden_size": 512, "intermediate_size": 1024, "layers": 2, "experts": 32, "experts_per_token": 2,
        "tokens": 64, "tasks": 4, "steps": 24, "steps_per_task": 6, "threads": 1, "repeats": 5, "seed": 0,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--records", nargs="+", type=int, default=[1, 4, 16], help="MiB of the records of the disk part"
    )
    parser.add_argument("--parts", nargs="+", default=["disk", "steps", "peers"], choices=("disk", "steps", "peers"))
    parser.add_argument("--json", help="file to write the figures to as well")
    arguments = parser.parse_args()
    if arguments.experts % 8:
        parser.error(f"--experts is a multiple of 8, not {arguments.experts}: an eighth of them is in the fast tier.")
    if not 1 < arguments.tasks <= 4 or arguments.steps % arguments.steps_per_task:
        parser.error("--tasks is 2, 3 or 4, for a quarter of the experts each, and --steps whole --steps_per_task.")
    figures = {"arguments": vars(arguments), **measure_all(arguments)}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure_all(arguments: argparse.Namespace) -> dict:
    """All parts that were asked for; prints each once it is there."""
    figures = {}
    if "disk" in arguments.parts:
        figures["disk"] = [run(measure_disk, arguments, size) for size in arguments.records]
        figures["machine"] = run(measure_machine, arguments)
        print_disk(figures)
    for part, share in (("steps", 8), ("peers", 4)):
        if part not in arguments.parts:
            continue
        touched = arguments.experts // share
        setups = {"all in memory, AdamW of all experts": (measure_memory,)}
        if part == "steps":
            for fast in (arguments.experts, touched * 2, touched, touched // 2):
                for ram in sorted({0, arguments.experts // 2 if fast < arguments.experts else 0}):
                    setups[f"store, {fast} fast, {ram} in RAM"] = (measure_store, fast, ram)
        else:
            setups[f"store, {touched} fast, 0 in RAM"] = (measure_store, touched, 0)
            setups["DeepSpeed ZeRO-3, all on NVMe"] = (measure_zero3,)
            setups["accelerate disk_offload, forward only"] = (measure_accelerate,)
        figures[part] = {}
        for name, (function, *options) in setups.items():
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            figures[part][name] = run(function, arguments, touched, *options)
        print_steps(figures[part], arguments, touched)
    return figures


def run(function, arguments: argparse.Namespace, *options) -> dict:
    """Calls `function` in a new process, with a folder of its own."""
    folder, context = tempfile.TemporaryDirectory(dir=arguments.folder), multiprocessing.get_context("spawn")
    with folder as path, context.Pool(1) as pool:
        return pool.apply(function, (arguments, path, *options))


def measure_machine(arguments: argparse.Namespace, folder: str) -> dict:
    """Copies in memory, in GB/s, and a matrix product, in GFLOP/s."""
    import torch

    torch.set_num_threads(arguments.threads)
    source, target = torch.ones(2, 64 * MIB, dtype=torch.uint8)
    left, right = torch.randn(2, 1024, 1024, dtype=getattr(torch, arguments.dtype))
    copying = min(seconds(lambda: target.copy_(source)) for _ in range(10))
    multiplying = min(seconds(lambda: left @ right) for _ in range(10))
    return {"copy_gb_per_second": source.nbytes / copying / 1e9, "gflop_per_second": 2 * 1024**3 / multiplying / 1e9}


def measure_disk(arguments: argparse.Namespace, folder: str, mib: int) -> dict:
    """Rates of a plain loop of direct I/O and of a store, for records of `mib` MiB: medians, in MB/s."""
    import torch

    from mixturekit.modeling import ExpertStore, ExpertStoreConfig
    from mixturekit.modeling.block_io import aligned_buffer, as_memory

    torch.set_num_threads(1)
    count, order = max(16, 256 // mib), random.Random(arguments.seed)
    # Weights and two moments of float32.
    shapes = {"weight": (mib * MIB // 12 // 256, 256)}
    rates = {name: [] for name in ("raw_read", "store_read", "raw_write", "store_write")}
    config = ExpertStoreConfig(f"{folder}/store", fast_capacity=count, ram_capacity=0)
    with ExpertStore(config, shapes, 1, count) as store:
        for expert in range(count):
            store.write_weights(0, expert, {"weight": torch.rand(shapes["weight"])})
        size = store.layout.disk_bytes
        descriptor = os.open(f"{folder}/raw", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(descriptor, 0, count * size)
        # Twice the records, as the store has two places for each.
        memory = [as_memory(row) for row in aligned_buffer(count, size).random_(0, 256)]
        # Round 0 writes to blocks that were never written before, which is slower for both.
        for number in range(arguments.repeats + 2):
            places = order.sample(range(count), count)
            elapsed = {}
            elapsed["raw_write"] = seconds(lambda: write_raw(descriptor, memory, places, size))  # noqa: B023
            elapsed["raw_read"] = seconds(lambda: read_raw(descriptor, memory, places, size))  # noqa: B023
            with store.held(0, range(count)):
                for expert in range(count):
                    store.mark_updated(0, expert, number + 1)
            elapsed["store_write"] = seconds(store.checkpoint)
            evict_all(store)
            elapsed["store_read"] = seconds(lambda: store.hold(0, places).wait())  # noqa: B023
            if number > 1:
                for name, value in elapsed.items():
                    rates[name].append(count * size / value / 1e6)
        os.close(descriptor)
    return {"mib": mib, "record_bytes": size, **{name: statistics.median(values) for name, values in rates.items()}}


def write_raw(descriptor: int, memory: list[memoryview], places: list[int], size: int) -> None:
    """Writes every block, one after the other, and waits until they are safe."""
    for place in places:
        os.pwritev(descriptor, [memory[place]], place * size)
    os.fdatasync(descriptor)


def read_raw(descriptor: int, memory: list[memoryview], places: list[int], size: int) -> None:
    """Reads every block, one after the other."""
    for place in places:
        os.preadv(descriptor, [memory[place]], place * size)


def evict_all(store) -> None:
    """Leaves the store's experts on disk alone, as opening it anew would."""
    with store._lock:
        store._check()
        for pool in store._pools:
            for key in list(pool.fast.rows):
                pool.fast.free.append(pool.fast.remove(key))


class Routes:
    """
    The experts of each token, planned: the tokens of a task go to `touched` experts, and no two tasks share one.

    Every one of them has a token. It takes the place of what a router chooses; the weights are still the router's.
    """

    def __init__(self, arguments: argparse.Namespace, touched: int):
        self.arguments, self.touched, self.task = arguments, touched, 0

    def attach(self, model) -> None:
        """Hooks the router of every layer."""
        for layer, block in enumerate(model.model.layers):
            block.mlp.gate.register_forward_hook(lambda module, args, output, layer=layer: self.plan(layer, output))

    def plan(self, layer: int, output: tuple) -> tuple:
        """Logits and weights of the router with the planned experts, `(tokens, experts per token)`."""
        import torch

        per_token, count = self.arguments.experts_per_token, self.arguments.experts
        chosen = random.Random(layer).sample(range(count), count)[self.task * self.touched :]
        rows = [
            [chosen[(token * per_token + slot) % self.touched] for slot in range(per_token)]
            for token in range(len(output[1]))
        ]
        return (output[0], output[1], torch.tensor(rows))


def build_model(arguments: argparse.Namespace, one_by_one: bool):
    """A small Mixtral; its experts fused, as in transformers, or `one_by_one`, as suits ZeRO and accelerate."""
    import torch
    from torch import nn
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256, hidden_size=arguments.hidden_size, intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=1 if one_by_one else arguments.experts, num_experts_per_tok=arguments.experts_per_token,
    )  # fmt: skip

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
            self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

        def forward(self, rows):
            gate, up = self.gate_up(rows).chunk(2, dim=-1)
            return self.down(nn.functional.silu(gate) * up)

    class Experts(nn.ModuleList):
        def forward(self, hidden_states, index, weights):
            output = torch.zeros_like(hidden_states)
            for expert in index.unique().tolist():
                rows, slots = (index == expert).nonzero(as_tuple=True)
                product = self[expert](hidden_states[rows]) * weights[rows, slots, None]
                output = output.index_add(0, rows, product.to(output.dtype))
            return output

    model = MixtralForCausalLM(config)
    if one_by_one:
        config.num_local_experts = arguments.experts
        for layer in model.model.layers:
            layer.mlp.gate.weight = nn.Parameter(torch.randn(arguments.experts, config.hidden_size) * 0.02)
            layer.mlp.gate.num_experts = arguments.experts
            layer.mlp.experts = Experts(Expert() for _ in range(arguments.experts))
    return model.to(getattr(torch, arguments.dtype))


def measure_steps(arguments: argparse.Namespace, touched: int, model, step, before=None, store=None) -> dict:
    """
    Times `step`, a training step on a batch.

    Args:
        arguments, touched: What is measured.
        model: Whose routers are told where to send tokens.
        step: Takes a batch `(1, tokens)`.
        before (*optional*): Called before each step, outside of its time.
        store (*optional*): Whose statistics belong to the result.
    """
    import torch

    routes = Routes(arguments, touched)
    routes.attach(model)
    generator = torch.Generator().manual_seed(arguments.seed)
    tasks, times = arguments.tasks, []
    batches = torch.randint(0, 256, (tasks + arguments.steps, 1, arguments.tokens), generator=generator)
    for number, batch in enumerate(batches):
        # Each task has one step to warm up.
        routes.task = number if number < tasks else (number - tasks) // arguments.steps_per_task % tasks
        if number == tasks:
            moved = bytes_moved()
            if store is not None:
                store.stats.reset()
        if before is not None:
            before()
        times.append(seconds(lambda: step(batch)))  # noqa: B023
    times = times[tasks:]
    read, written = (now - then for now, then in zip(bytes_moved(), moved, strict=True))
    row = {"median s": statistics.median(times), "mean s": statistics.mean(times), "times": times}
    row |= {"MB read": read / len(times) / 1e6, "MB written": written / len(times) / 1e6}
    if store is not None:
        row |= {"hits": store.stats.hit_rate, "waiting s": store.stats.stall_seconds / len(times)}
    return row


def measure_memory(arguments: argparse.Namespace, folder: str, touched: int) -> dict:
    """All in memory, with torch's own AdamW for everything."""
    import torch

    torch.set_num_threads(arguments.threads)
    model = build_model(arguments, one_by_one=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batch):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return measure_steps(arguments, touched, model, step)


def measure_store(arguments: argparse.Namespace, folder: str, touched: int, fast: int, ram: int) -> dict:
    """Experts in a store, with `fast` and `ram` of each layer above the disk."""
    import torch

    from mixturekit.modeling import ExpertStoreConfig, LazyAdamW, offload_experts

    torch.set_num_threads(arguments.threads)
    model = build_model(arguments, one_by_one=False)
    store = offload_experts(model, ExpertStoreConfig(f"{folder}/store", fast, ram))
    optimizer = LazyAdamW(store, model.parameters())

    def step(batch):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with store:
        return measure_steps(arguments, touched, model, step, store=store)


def measure_zero3(arguments: argparse.Namespace, folder: str, touched: int) -> dict:
    """Parameters and optimizer on NVMe, MoE blocks as leaf modules, which correct gradients need."""
    import torch

    try:
        import deepspeed
        from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
        from deepspeed.utils import set_z3_leaf_modules
    except ImportError:
        return {"skipped": "deepspeed is not installed: pip install mixturekit[offload]"}
    if not AsyncIOBuilder().is_compatible() or not CPUAdamBuilder().is_compatible():
        return {"skipped": "DeepSpeed's extensions do not compile here: see python recipes/doctor.py"}
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "29577", "PYTHONWARNINGS": "ignore"}
    torch.set_num_threads(arguments.threads)
    expert = 3 * arguments.hidden_size * arguments.intermediate_size
    nvme = {"device": "nvme", "nvme_path": folder, "pin_memory": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": arguments.dtype == "bfloat16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {
                **nvme,
                "buffer_count": 2 * arguments.experts + 8,
                "buffer_size": expert,
                "max_in_cpu": 0,
            },
            "offload_optimizer": {**nvme, "buffer_count": 5},
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        },
        "aio": {"block_size": MIB, "queue_depth": 8, "overlap_events": True},
    }
    deepspeed.init_distributed("gloo")
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = build_model(arguments, one_by_one=True)
    set_z3_leaf_modules(model, [MixtralSparseMoeBlock])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(batch):
        engine.backward(engine(batch, labels=batch).loss)
        engine.step()

    return measure_steps(arguments, touched, engine.module, step)


def measure_accelerate(arguments: argparse.Namespace, folder: str, touched: int) -> dict:
    """Forward passes alone, because it leaves no gradients; the files are not in the page cache."""
    import torch
    from accelerate import disk_offload

    torch.set_num_threads(arguments.threads)
    model = build_model(arguments, one_by_one=True)
    disk_offload(model, folder, execution_device=torch.device("cpu"))

    def forget():
        for path in Path(folder).glob("*.dat"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    with torch.no_grad():
        return measure_steps(arguments, touched, model, lambda batch: model(batch), before=forget)


def bytes_moved() -> tuple[int, int]:
    """Bytes that this process has had read from, and written to, a disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def seconds(function) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def print_disk(figures: dict) -> None:
    """The limits, and what the store makes of them."""
    from rich.console import Console
    from rich.table import Table

    machine = figures["machine"]
    copying, product = machine["copy_gb_per_second"], machine["gflop_per_second"]
    table = Table(
        title=f"Direct I/O in MB/s; a copy in memory runs at {copying:.1f} GB/s, a product at {product:.0f} GFLOP/s"
    )
    for column in ("record MiB", "raw read", "store read", "of raw", "raw write", "store write", "of raw"):
        table.add_column(column, justify="right")
    for row in figures["disk"]:
        cells = [f"{row['record_bytes'] / MIB:.1f}"]
        for kind in ("read", "write"):
            raw, store = row[f"raw_{kind}"], row[f"store_{kind}"]
            cells += [f"{raw:.0f}", f"{store:.0f}", f"{100 * store / raw:.0f} %"]
        table.add_row(*cells)
    Console(width=130).print(table)


def print_steps(rows: dict[str, dict], arguments: argparse.Namespace, touched: int) -> None:
    """One line per setup, against the one in memory."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{arguments.layers} layers of {arguments.experts} experts, {touched} of each layer in a batch of "
        f"{arguments.tokens} tokens, another of {arguments.tasks} tasks every {arguments.steps_per_task} of "
        f"{arguments.steps} steps"
    )
    table.add_column("per step")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    # Not of medians, which leave out the steps at which tasks change.
    memory = next(iter(rows.values()))["mean s"]
    for name, row in rows.items():
        if "skipped" in row:
            table.add_row(name, row["skipped"])
            continue
        row["of memory"] = row["mean s"] / memory
        formats = {"MB read": ".1f", "MB written": ".1f", "hits": ".1%", "of memory": ".2f"}
        table.add_row(name, *(format(row[key], formats.get(key, ".3f")) if key in row else "" for key in COLUMNS))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

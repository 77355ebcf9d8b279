"""Tokens per second, memory and arithmetic rate of the MoRE variants, beside Mixtral of transformers in the same run.

python recipes/benchmarks/more_throughput.py --threads 1

Each model runs in a process of its own, so that its peak memory is its own. Time is processor time on a CPU, which
other programs disturb least, and wall time on a GPU.
"""

import argparse
import json
import multiprocessing
import resource
import time

VARIANTS = ("mixtral", "base", "more_a", "more_b", "more_c", "more_d")


def main() -> None:
    """Measures every variant and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden_size": 512, "intermediate_size": 1368, "recurrent_size": 2048, "layers": 6, "heads": 8, "experts": 8,
        "experts_per_token": 1, "batch": 4, "sequence": 256, "vocab": 50257, "recurrences": 4, "repeats": 4,
        "threads": 1,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--json", help="file to write the figures to as well")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    for variant in arguments.variants:
        print(f"measuring {variant} ...", flush=True)
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (variant, arguments)))
    print_table(rows, arguments)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(arguments), "rows": rows}, file, indent=2)


def measure(variant: str, arguments: argparse.Namespace) -> dict:
    """Best of several forward and backward passes of one variant, without an optimizer."""
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    peak_rate = matrix_product_rate(arguments.device, dtype)
    model, flops_per_token = build(variant, arguments)
    model.to(arguments.device, dtype).train()
    tokens = torch.randint(0, arguments.vocab, (arguments.batch, arguments.sequence), device=arguments.device)
    forward, total = [], []
    for _ in range(arguments.repeats + 1):
        model.zero_grad(set_to_none=True)
        start = now(arguments.device)
        loss = model(tokens, labels=tokens).loss
        middle = now(arguments.device)
        loss.backward()
        forward.append(middle - start)
        total.append(now(arguments.device) - start)
    seconds, count = min(total[1:]), tokens.numel()
    memory = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else peak_resident_bytes()
    return {
        "variant": variant,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_tokens_per_second": count / min(forward[1:]),
        "tokens_per_second": count / seconds,
        "peak_bytes": memory,
        "flops_per_token": flops_per_token,
        "flops_per_second": 3 * flops_per_token * count / seconds,
        "share_of_peak": 3 * flops_per_token * count / seconds / peak_rate,
    }


def build(variant: str, arguments: argparse.Namespace):
    """The model, and the floating-point operations of its forward pass per token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from mixturekit.modeling import MoreConfig, MoreForCausalLM

    shape = {
        "vocab_size": arguments.vocab, "hidden_size": arguments.hidden_size, "num_attention_heads": arguments.heads,
        "intermediate_size": arguments.intermediate_size, "num_hidden_layers": arguments.layers,
        "num_key_value_heads": arguments.heads, "num_experts_per_tok": arguments.experts_per_token,
        "tie_word_embeddings": False,
    }  # fmt: skip
    more = MoreConfig(
        **shape,
        expert_type="base" if variant == "mixtral" else variant,
        num_experts=arguments.experts,
        num_recurrences=arguments.recurrences,
        recurrent_size=arguments.recurrent_size,
    )
    flops = more.flops_per_token(arguments.sequence)
    if variant != "mixtral":
        return MoreForCausalLM(more), flops
    mixtral = MixtralConfig(**shape, num_local_experts=arguments.experts, output_router_logits=True)
    model = MixtralForCausalLM(mixtral)
    model.set_experts_implementation("grouped_mm")
    return model, flops


def matrix_product_rate(device: str, dtype) -> float:
    """Floating-point operations per second of a large matrix product on this machine."""
    import torch

    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = now(device)
        left @ right
        best = min(best, now(device) - start)
    return 2 * size**3 / best


def now(device: str) -> float:
    """Processor seconds on a CPU, wall seconds after all work has finished on a GPU."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def peak_resident_bytes() -> int:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_table(rows: list[dict], arguments: argparse.Namespace) -> None:
    """One line per variant, with the ratios that the figures are for."""
    from rich.console import Console
    from rich.table import Table

    by_name = {row["variant"]: row for row in rows}
    title = (
        f"{arguments.batch} x {arguments.sequence} tokens, width {arguments.hidden_size}, {arguments.layers} layers, "
        f"{arguments.experts} experts, top-{arguments.experts_per_token}, {arguments.recurrences} recurrences, "
        f"{arguments.dtype}, {arguments.threads} thread(s) of {arguments.device}"
    )
    table = Table(title=title)
    columns = ["variant", "M parameters", "tokens/s forward", "tokens/s forward+backward", "peak MB", "MFLOP/token"]
    columns += ["GFLOP/s", "of matrix product", "of base's rate", "of mixtral's tokens/s"]
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        rate = by_name["base"]["flops_per_second"] if "base" in by_name else float("nan")
        speed = by_name["mixtral"]["tokens_per_second"] if "mixtral" in by_name else float("nan")
        table.add_row(
            row["variant"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['forward_tokens_per_second']:.0f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['flops_per_token'] / 1e6:.0f}",
            f"{row['flops_per_second'] / 1e9:.1f}",
            f"{100 * row['share_of_peak']:.0f} %",
            f"{100 * row['flops_per_second'] / rate:.0f} %",
            f"{row['tokens_per_second'] / speed:.2f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

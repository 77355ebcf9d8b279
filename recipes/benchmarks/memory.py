"""Memory of training MoRE, measured, beside what the formula of the README says: state, activations, and the process.

python recipes/benchmarks/memory.py --preset tiny --batch 4 --sequence 256
python recipes/benchmarks/memory.py --preset tiny --processes 2

Each kind of expert is measured in a process of its own, or in several that share the model by FSDP2 on gloo:
- state: bytes of weights, gradients and Adam's moments after an update; the formula is 16 P / N.
- activations: bytes that autograd keeps for the backward pass; the formula is k x tokens x layers x hidden size.
- peak: what the process grew by at most, read from the system. Gradients on their way and the temporaries of the
  optimizer are in it, too, which the formula leaves out.
"""

import argparse
import multiprocessing
import resource
import socket
from pathlib import Path

# Bytes that are kept for each token, layer and unit of width, in float32 and with 4 recurrences.
KEPT = {"base": 107, "more_a": 460, "more_b": 171, "more_c": 154, "more_d": 185}


def main() -> None:
    """Measures every kind of expert and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    for name, default in {"batch": 4, "sequence": 256, "processes": 1, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--expert_types", nargs="+", default=tuple(KEPT), choices=tuple(KEPT))
    arguments = parser.parse_args()
    rows = []
    for expert_type in arguments.expert_types:
        print(f"measuring {expert_type} ...", flush=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            jobs = [(expert_type, arguments, rank, port) for rank in range(arguments.processes)]
            # The process that holds most is the one that has to fit.
            rows.append(max(pool.starmap(measure, jobs, chunksize=1), key=lambda row: row["peak"]))
    print_table(rows, arguments)


def measure(expert_type: str, arguments: argparse.Namespace, rank: int, port: int) -> dict:
    """Bytes of two updates of one kind of expert in this process, measured and by the formula."""
    import torch

    from mixturekit.modeling import MoreConfig, MoreForCausalLM

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = MoreConfig.from_preset(arguments.preset, expert_type)
    before = resident_bytes()
    model = MoreForCausalLM(config).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if arguments.processes > 1:
        shard(model, rank, arguments.processes, port)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, config.vocab_size, (arguments.batch, arguments.sequence))
    for _ in range(2):
        with KeptBytes(model) as kept:
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        state = state_bytes(model, optimizer)
        optimizer.zero_grad()
    if arguments.processes > 1:
        torch.distributed.destroy_process_group()
    return {
        "expert_type": expert_type,
        "parameters": parameters,
        "state": state,
        "activations": kept.total,
        "peak": peak_resident_bytes() - before,
        "state_by_formula": 16 * parameters / arguments.processes,
        "activations_by_formula": KEPT[expert_type] * tokens.numel() * config.num_hidden_layers * config.hidden_size,
    }


def shard(model, rank: int, processes: int, port: int) -> None:
    """Splits a model over processes as fsdp2.yaml does, layer by layer."""
    import torch
    from torch.distributed.fsdp import fully_shard

    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    mesh = torch.distributed.init_device_mesh("cpu", (processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


class KeptBytes:
    """Counts the memory that autograd keeps for the backward pass, without that of the weights."""

    def __init__(self, model):
        import torch

        self.sizes: dict[int, int] = {}
        self._weights = {local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor):
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in self._weights:
            # Views of one tensor take their memory once.
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    @property
    def total(self) -> int:
        """All that was kept."""
        return sum(self.sizes.values())


def local(tensor):
    """The part of a tensor that is in this process."""
    import torch

    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def state_bytes(model, optimizer) -> int:
    """Bytes of weights, gradients and moments in this process."""
    tensors = list(model.parameters())
    tensors += [parameter.grad for parameter in model.parameters()]
    tensors += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """The most that it has ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def print_table(rows: list[dict], arguments: argparse.Namespace) -> None:
    """Prints the figures in MB as a table of Markdown."""
    tokens = arguments.batch * arguments.sequence
    print(f"{arguments.preset}, {tokens} tokens in each of {arguments.processes} processes, MB")
    print("| experts | P | state: formula | measured | activations: formula | measured | sum by formula | peak |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        figures = (
            row["state_by_formula"], row["state"], row["activations_by_formula"], row["activations"],
            row["state_by_formula"] + row["activations_by_formula"], row["peak"],
        )  # fmt: skip
        cells = " | ".join(f"{value / 1e6:.0f}" for value in figures)
        print(f"| `{row['expert_type']}` | {row['parameters'] / 1e6:.1f} M | {cells} |")


if __name__ == "__main__":
    main()

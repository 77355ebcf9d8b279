"""Time of a pathway policy's step and update, fused and with one `torch.nn.GRU` per router and expert, in one run.

python recipes/benchmarks/mop_policy.py --threads 1

The plain version has the same weights; it steps through the sequence, zeroes states where an episode ends, and runs
encoder and layers at every step, as a loop over environments does. Both are checked to give the same logits and
gradients before they are timed. Time is processor time on a CPU and wall time on a GPU, the median of interleaved
repeats.
"""

import argparse
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mixturekit.modeling import MopConfig, MopForActionPrediction

MISSIONS = ["go to a red ball", "go to the blue key", "pick up a grey box", "go to the red ball"]


class PlainBlock(nn.Module):
    """A layer of pathways with one `torch.nn.GRU` per router and expert, for one step at a time."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.grus = nn.ModuleList()
        for index, size in enumerate(block.gru.sizes):
            gru = nn.GRU(block.gru.input_weight.shape[-1], size)
            for parameter, weight in zip(gru.parameters(), block.gru.gru_weights(index), strict=True):
                parameter.data = weight.detach().clone()
            self.grus.append(gru)
        self.outputs = nn.ModuleList()
        for weight, bias in zip(
            block.output_weight.split(block.unit_sizes, dim=1), block.output_bias.unbind(), strict=True
        ):
            output = nn.Linear(weight.shape[1], weight.shape[0])
            output.weight.data, output.bias.data = weight.detach().clone(), bias.detach().clone()
            self.outputs.append(output)
        self.norms = nn.ModuleList([nn.LayerNorm(size) for size in block.unit_sizes])

    def forward(self, x, states):
        """One step `(1, batch, stream)` from the states of all GRUs, each `(1, batch, size)`."""
        outputs, new_states = zip(*[gru(x, state) for gru, state in zip(self.grus, states, strict=True)], strict=True)
        weights = self.block.router(torch.relu(outputs[0])).softmax(dim=-1)
        mixed = torch.zeros_like(x)
        experts = zip(outputs[1:], self.norms, self.outputs, strict=True)
        for index, (hidden, norm, output) in enumerate(experts):
            mixed = mixed + weights[..., index : index + 1] * output(torch.relu(norm(hidden)))
        return self.block.norm(x + mixed), list(new_states)


class PlainPolicy(nn.Module):
    """The same policy, step by step."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        self.blocks = nn.ModuleList([PlainBlock(block) for block in policy.model.blocks])

    def initial_state(self, batch):
        """Zeros for every GRU of every layer."""
        weight = self.policy.action_head.weight
        return [[weight.new_zeros(1, batch, gru.hidden_size) for gru in block.grus] for block in self.blocks]

    def step(self, inputs, state, keep):
        """Logits `(batch, actions)` of one step, after zeroing the states of new episodes."""
        missions = self.policy.encoder.mission(inputs["mission_input_ids"])
        features = self.policy.encoder(inputs["images"], inputs["directions"], inputs["mission_index"], missions)
        x = self.policy.model.input_projection(features.transpose(0, 1))
        new_state = []
        for block, states in zip(self.blocks, state, strict=True):
            x, states = block(x, [part * keep for part in states])
            new_state.append(states)
        return self.policy.action_head(x[0]), new_state

    def sequence(self, inputs):
        """Logits `(batch, time, actions)`."""
        state, logits = self.initial_state(len(inputs["images"])), []
        for step in range(inputs["images"].shape[1]):
            current = {
                name: value if name == "mission_input_ids" else value[:, step : step + 1]
                for name, value in inputs.items()
            }
            keep = (~current["reset_mask"]).float().unsqueeze(0)
            step_logits, state = self.step(current, state, keep)
            logits.append(step_logits)
        return torch.stack(logits, dim=1)


def observe(policy, batch, time_steps, device):
    """Random observations with an episode's end every ten steps on average."""
    generator = torch.Generator().manual_seed(0)
    limits = torch.tensor([11, 6, 3])
    inputs = {
        "images": (torch.rand(batch, time_steps, 7, 7, 3, generator=generator) * limits).to(torch.uint8),
        "directions": torch.randint(4, (batch, time_steps), generator=generator),
        "mission_index": torch.randint(len(MISSIONS), (batch, time_steps), generator=generator),
        "reset_mask": torch.rand(batch, time_steps, generator=generator) < 0.1,
        **policy.prepare_missions(MISSIONS),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def check_parity(policy, plain, inputs) -> None:
    """Raises `AssertionError` unless both versions give the same logits and the same gradient of the encoder."""
    fused, slow = policy(**inputs).logits, plain.sequence(inputs)
    torch.testing.assert_close(fused, slow, atol=1e-5, rtol=1e-5)
    weight = policy.model.input_projection.weight
    gradients = [torch.autograd.grad(logits.square().mean(), weight)[0] for logits in (fused, slow)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def time_of(functions: dict, repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of each function, called in turns."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:
                times[name].append(clock() - start)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def measure(batch: int, arguments: argparse.Namespace) -> list[dict]:
    """Rows of the table for one batch size."""
    torch.manual_seed(0)
    policy = MopForActionPrediction(MopConfig(layers=arguments.layers)).to(arguments.device)
    plain = PlainPolicy(policy).to(arguments.device)
    inputs = observe(policy, batch, arguments.unroll_len, arguments.device)
    check_parity(policy, plain, inputs)
    labels = torch.zeros_like(inputs["directions"])
    one = {name: value if name == "mission_input_ids" else value[:, :1] for name, value in inputs.items()}
    keep = (~one["reset_mask"]).float().unsqueeze(0)
    state, plain_state = policy.initial_state(batch), plain.initial_state(batch)

    def update(logits_of):
        nn.functional.cross_entropy(logits_of().flatten(0, 1), labels.flatten()).backward()

    with torch.no_grad():
        steps = {
            "plain": lambda: plain.step(one, plain_state, keep),
            "fused": lambda: policy(**one, state=state),
        }
        step_times = time_of(steps, 20 * arguments.repeats, arguments.device)
    updates = {
        "plain": lambda: update(lambda: plain.sequence(inputs)),
        "fused": lambda: update(lambda: policy(**inputs).logits),
    }
    update_times = time_of(updates, arguments.repeats, arguments.device)
    return [
        {"what": "step, no gradient", "batch": batch, **step_times},
        {"what": f"{arguments.unroll_len} steps, forward and backward", "batch": batch, **update_times},
    ]


def main() -> None:
    """Measures all batch sizes and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="32,64,128;64,128,256", help="sizes of the experts of each layer")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--unroll_len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", help="file to write the figures to as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for batch in arguments.batches for row in measure(batch, arguments)]
    clock = "processor" if arguments.device == "cpu" else "wall"
    table = Table(title=f"Milliseconds of {clock} time, {arguments.threads} thread(s), layers {arguments.layers}")
    for name in ("what", "batch", "one nn.GRU per expert", "fused", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        ratio = f"{row['plain'] / row['fused']:.2f}"
        table.add_row(row["what"], str(row["batch"]), f"{row['plain']:.2f}", f"{row['fused']:.2f}", ratio)
    Console(width=110).print(table)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(arguments), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()

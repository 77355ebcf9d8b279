"""Time and memory of one rollout and its updates: PPOTrainer, TRL's GRPOTrainer, and the PPO that TRL had until 1.12.

python recipes/benchmarks/ppo_step.py --repeats 3

Each trainer runs in processes of its own, one after the other, with the same Phi-MoE, adapters, prompts, tokens and
epochs: completions are of full length, and the first rollout and its updates are not counted. TRL 1.12 is installed
into a folder of its own (`--trl_folder`); where it cannot be, it is left out and the reason is printed. Time is
processor time on a CPU and wall time on a GPU.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp

TRAINERS = {
    "PPOTrainer": "mixturekit",
    "PPOTrainer, reference features": "mixturekit",
    "GRPOTrainer": "TRL",
    "TRL 1.12 PPOTrainer": "TRL 1.12",
}
OLD_TRL = "1.12.0"
PHASES = ("generation", "scoring", "update")
MARK = "RESULT "


def main() -> None:
    """Runs every trainer several times and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--num_experts", type=int, default=16)
    parser.add_argument("--expert_size", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=16, help="completions of a rollout, two of each prompt")
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--completion_length", type=int, default=128)
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4, help="times that a rollout is learned from")
    parser.add_argument("--rollouts", type=int, default=2, help="rollouts that are counted")
    parser.add_argument("--lora_experts", action="store_true", help="adapters on experts, and not on attention alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trl_folder", default=str(Path.home() / ".cache" / "mixturekit" / f"trl-{OLD_TRL}"))
    parser.add_argument("--output", default="ppo_step.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(MARK + json.dumps(measure(arguments)))
        return
    trainers = list(TRAINERS)
    reason = install_old_trl(Path(arguments.trl_folder))
    if reason:
        print(f"Without {trainers.pop()}: {reason}")
    runs = {name: [] for name in trainers}
    for _ in range(arguments.repeats):
        for name in trainers:
            runs[name].append(run_worker(name, arguments))
            print(f"{name}: {runs[name][-1]['total']:.1f} s", flush=True)
    Path(arguments.output).write_text(json.dumps({"settings": vars(arguments), "runs": runs}, indent=2))
    print_table(runs)
    print(f"All runs: {arguments.output}")


def install_old_trl(folder: Path) -> str | None:
    """Puts TRL 1.12 into a folder without touching the environment; returns why not, if it cannot be."""
    if (folder / "trl").is_dir():
        return None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, f"trl=={OLD_TRL}"], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def run_worker(name: str, arguments) -> dict:
    """What one process measures."""
    path = [arguments.trl_folder] if "1.12" in name else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([*path, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--worker", name], capture_output=True, text=True, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix(MARK))


class Clock:
    """Adds up time by phase; of phases within one another, the outer one counts."""

    def __init__(self):
        import torch

        self.on_gpu = torch.cuda.is_available()
        self.phases: Counter[str] = Counter()
        self.started = self.begun = 0.0
        self._inside = False

    def now(self) -> float:
        """Seconds of the processor, or by the wall where a GPU works."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def restart(self) -> None:
        """Forgets what was before."""
        self.phases.clear()
        self.begun = self.now()

    def wrap(self, function, phase):
        """The function, timed as `phase`, or as what `phase()` says."""

        def timed(*args, **kwargs):
            if self._inside:
                return function(*args, **kwargs)
            self._inside, started = True, self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.phases[phase() if callable(phase) else phase] += self.now() - started

        return timed


def build(arguments):
    """Policy, tokenizer and adapters: the same for all."""
    import torch
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PhimoeConfig, PhimoeForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(arguments.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", padding_side="left"
    )
    config = PhimoeConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.expert_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=arguments.hidden_size // 8,
        num_local_experts=arguments.num_experts,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    policy = PhimoeForCausalLM(config)
    # No completion ends early, so that all trainers have as many tokens.
    policy.lm_head.bias = torch.nn.Parameter(torch.zeros(arguments.vocab_size), requires_grad=False)
    policy.lm_head.bias.data[:3] = -1e4
    experts = ["experts.gate_up_proj", "experts.down_proj"] if arguments.lora_experts else None
    adapter = LoraConfig(
        r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], target_parameters=experts, task_type="CAUSAL_LM"
    )
    return policy, tokenizer, adapter


def measure(arguments) -> dict:
    """Runs one trainer, and returns seconds by phase, peak memory in MB, and how many parameters it trains."""
    clock = Clock()
    make = old_trl_trainer if "1.12" in arguments.worker else new_trl_trainer
    trainer = make(arguments, clock)
    # Trainers print their metrics.
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    total = clock.now() - clock.begun
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if clock.on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**20
    trained = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"] if p.requires_grad)
    phases = {phase: clock.phases[phase] / arguments.rollouts for phase in PHASES}
    return {**phases, "total": total / arguments.rollouts, "peak": peak, "trained": trained}


def prompts(arguments, count: int) -> list[str]:
    """Prompts of random words."""
    import random

    rng = random.Random(0)
    return [
        " ".join(f"w{rng.randrange(3, arguments.vocab_size)}" for _ in range(arguments.prompt_length))
        for _ in range(count)
    ]


def new_trl_trainer(arguments, clock: Clock):
    """GRPOTrainer of the installed TRL, or PPOTrainer on it; both with two completions of each prompt."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    policy, tokenizer, adapter = build(arguments)
    steps = arguments.sequences // arguments.micro_batch
    options = {
        "output_dir": mkdtemp(), "per_device_train_batch_size": arguments.micro_batch,
        "gradient_accumulation_steps": steps, "num_iterations": arguments.epochs, "num_generations": 2,
        "max_completion_length": arguments.completion_length, "beta": 0.05, "learning_rate": 1e-5,
        "max_steps": arguments.epochs * (1 + arguments.rollouts), "report_to": [], "save_strategy": "no",
        "logging_steps": arguments.epochs, "gradient_checkpointing": False, "bf16": clock.on_gpu,
        "use_cpu": not clock.on_gpu, "disable_tqdm": True, "scale_rewards": "none",
    }  # fmt: skip
    if arguments.worker.startswith("PPOTrainer"):
        from mixturekit.trainers.ppo_config import PPOConfig
        from mixturekit.trainers.ppo_trainer import PPOTrainer

        features = "ref" if "reference" in arguments.worker else "policy"
        trainer_class, config = PPOTrainer, PPOConfig(**options, critic_features=features)
    else:
        trainer_class, config = GRPOTrainer, GRPOConfig(**options)
    count = arguments.sequences // 2 * (2 + arguments.rollouts)
    trainer = trainer_class(
        policy,
        lambda completions, **kwargs: [hash(completion) % 5 / 4 for completion in completions],
        config,
        train_dataset=Dataset.from_dict({"prompt": prompts(arguments, count)}),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer._generate_single_turn = clock.wrap(trainer._generate_single_turn, "generation")
    trainer._get_per_token_logps_and_entropies = clock.wrap(trainer._get_per_token_logps_and_entropies, "scoring")
    step = type(trainer).training_step

    def training_step(model, inputs, num_items_in_batch=None):
        # The rollout happens within a step, before its forward pass.
        loss = clock.wrap(trainer.compute_loss, "update")
        backward = trainer.accelerator.backward
        trainer.compute_loss, trainer.accelerator.backward = loss, clock.wrap(backward, "update")
        try:
            return step(trainer, model, inputs, num_items_in_batch)
        finally:
            del trainer.compute_loss
            trainer.accelerator.backward = backward

    trainer.training_step = training_step

    class AfterTheFirst(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == arguments.epochs:
                clock.restart()

    trainer.add_callback(AfterTheFirst())
    torch.manual_seed(0)
    return trainer


def old_trl_trainer(arguments, clock: Clock):
    """TRL 1.12's PPOTrainer; its critic is a second backbone, and its reward a module, which here has no weights."""
    import torch
    from datasets import Dataset
    from transformers import PhimoeForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    policy, tokenizer, adapter = build(arguments)
    policy.config.num_labels = 1
    critic = PhimoeForSequenceClassification(policy.config)

    class Backbone(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            return type("Output", (), {"hidden_states": [input_ids.float().unsqueeze(-1) % 5 / 4]})

    class Reward(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self):
            super().__init__()
            self.backbone, self.score = Backbone(), torch.nn.Identity()

    config = PPOConfig(
        output_dir=mkdtemp(),
        per_device_train_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=arguments.sequences // arguments.micro_batch,
        num_mini_batches=1,
        num_ppo_epochs=arguments.epochs,
        response_length=arguments.completion_length,
        local_rollout_forward_batch_size=arguments.sequences,
        total_episodes=arguments.sequences * (1 + arguments.rollouts),
        learning_rate=1e-5,
        kl_coef=0.05,
        temperature=1.0,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=clock.on_gpu,
        use_cpu=not clock.on_gpu,
        disable_tqdm=True,
    )
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in prompts(arguments, 4 * arguments.sequences)]
    trainer = PPOTrainer(
        config, tokenizer, policy, None, Reward(), Dataset.from_list(rows), critic, peft_config=adapter
    )
    phase = lambda: "update" if torch.is_grad_enabled() else "scoring"  # noqa: E731
    ppo_trainer.batch_generation = clock.wrap(ppo_trainer.batch_generation, "generation")
    ppo_trainer.forward = clock.wrap(ppo_trainer.forward, phase)
    ppo_trainer.get_reward = clock.wrap(ppo_trainer.get_reward, phase)
    trainer.accelerator.backward = clock.wrap(trainer.accelerator.backward, "update")

    class AfterTheFirst(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                clock.restart()

    trainer.add_callback(AfterTheFirst())
    return trainer


def print_table(runs: dict[str, list[dict]]) -> None:
    """Prints medians, and the ratios that matter."""
    from rich.table import Table

    from mixturekit.trainers.wide_console import wide_console

    table = Table(title="One rollout and its updates, median of the repeats")
    table.add_column("trainer")
    for column in (*(f"{phase}, s" for phase in PHASES), "rest, s", "total, s", "peak, MB", "trained parameters"):
        table.add_column(column, justify="right")
    medians = {}
    for name, measured in runs.items():
        row = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        medians[name] = row
        rest = row["total"] - sum(row[phase] for phase in PHASES)
        seconds = [f"{value:.2f}" for value in (*(row[phase] for phase in PHASES), rest, row["total"])]
        table.add_row(name, *seconds, f"{row['peak']:,.0f}", f"{row['trained']:,}")
    console = wide_console()
    console.print(table)
    ours = [name for name in medians if name.startswith("PPOTrainer")]
    for name in ours:
        for other in medians:
            if other not in ours:
                time_ratio = medians[name]["total"] / medians[other]["total"]
                memory_ratio = medians[name]["peak"] / medians[other]["peak"]
                console.print(f"{name} over {other}: {time_ratio:.2f} of its time, {memory_ratio:.2f} of its memory")


if __name__ == "__main__":
    main()

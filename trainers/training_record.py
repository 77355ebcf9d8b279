"""What a run leaves for its card: the command, arguments, hardware, time, the last evaluation and the routing."""

import json
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from ..hub_cards.published_files import shareable, shareable_text
from ..modeling.offloaded_experts import offloaded_parameters
from .routing_callback import RoutingCallback
from .whole_files import write_whole_text

RECORD = "training_record.json"

_PACKAGES = ("mixturekit", "torch", "transformers", "trl", "peft", "minigrid")
# What decides how a run learns; where and how it was logged does not matter to others.
_ARGUMENTS = (
    "learning_rate", "value_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed",
    "data_seed", "bf16", "fp16", "num_generations", "num_iterations", "max_completion_length", "beta", "epsilon",
    "gamma", "lam", "kl_in", "critic_level", "critic_features", "router_replay", "freeze_router",
)  # fmt: skip

_TOKENS = {"--hub_token", "--hub-token", "--push_to_hub_token", "--token"}


def training_record(
    system: str,
    model: PreTrainedModel,
    arguments: TrainingArguments,
    state: TrainerState,
    data: dict,
    routing: dict | None = None,
) -> dict:
    """
    What is known of a run, for JSON, without secrets and without paths of the machine.

    Args:
        system (`str`): `more`, `mop` or `ppo`: whose card it is.
        model (`PreTrainedModel`): The model as it is now.
        arguments (`TrainingArguments`): Those of the run.
        state (`TrainerState`): Its log.
        data (`dict`): What it learned from, and what else its card tells.
        routing (`dict`, *optional*): What [`routing_facts`] gives.
    """
    values = arguments.to_dict()
    log = state.log_history
    finished = next((entry for entry in reversed(log) if "train_runtime" in entry), None)
    record = {
        "system": system,
        "command": launch_command(arguments.world_size),
        "steps": state.global_step,
        "seconds": finished["train_runtime"] if finished else None,
        "hardware": hardware(arguments),
        "versions": _versions(),
        "parameters": parameter_counts(model),
        "arguments": {name: values[name] for name in _ARGUMENTS if values.get(name) is not None},
        "world_size": arguments.world_size,
        "data": data,
        "evaluation": next((entry for entry in reversed(log) if any(key.startswith("eval_") for key in entry)), None),
        # Not every entry has every figure: a rollout serves several updates.
        "last_log": {name: value for entry in log if "loss" in entry for name, value in entry.items()},
        "routing": routing,
    }
    return shareable({name: value for name, value in record.items() if value is not None})


def save_training_record(record: dict, folder: str | Path) -> None:
    """Saves the record beside a model; a file that is half written is never there."""
    write_whole_text(Path(folder, RECORD), json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def load_training_record(folder: str | Path) -> dict:
    """
    The record of a run.

    Raises:
        FileNotFoundError: If the folder has none.
    """
    path = Path(folder, RECORD)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {RECORD}, from which its card is written: no recipe has trained it.")
    return json.loads(path.read_text("utf-8"))


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """All parameters, and the active ones, which a token uses: of the experts, as many as it is sent to."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    # A critic is no part of the policy.
    sizes = {name: size_of(value) for name, value in model.named_parameters() if "value_head." not in name}
    in_store = offloaded_parameters(model)
    total = sum(sizes.values()) + in_store
    if not experts or not chosen:
        return {"total": total, "active": total}
    routed = in_store + sum(size for name, size in sizes.items() if ".experts." in name)
    return {"total": total, "active": total - routed + routed * chosen // experts}


def size_of(parameter: torch.nn.Parameter) -> int:
    """The elements of a parameter, of which ZeRO-3 leaves none in its place."""
    return getattr(parameter, "ds_numel", parameter.numel())


def routing_facts(callbacks: list[TrainerCallback]) -> dict | None:
    """The scalars and expert loads that a [`RoutingCallback`] wrote last, `None` if there is none or nothing yet."""
    for callback in callbacks:
        if isinstance(callback, RoutingCallback) and callback.metrics:
            return {
                "metrics": dict(callback.metrics),
                "loads": {str(key): load for key, load in callback.loads.items()},
            }
    return None


def launch_command(processes: int = 1) -> str | None:
    """How the recipe of this process was started, `None` if it is none."""
    script = Path(sys.argv[0])
    if script.parent.name != "recipes":
        return None
    given, options = iter(sys.argv[1:]), []
    for option in given:
        name, equals, value = option.partition("=")
        if name in _TOKENS:
            # The value of an option comes after it, unless they are one word.
            _ = equals or next(given, None)
        else:
            options.append(f"{name}={_relative(value)}" if equals else _relative(option))
    several = f"--num_processes {processes} " if processes > 1 else ""
    return f"accelerate launch {several}recipes/{script.name} {shlex.join(options)}".rstrip()


def _relative(text: str) -> str:
    parts = Path(text).parts
    # A configuration that ships here is found by everyone.
    return "/".join(parts[parts.index("recipes") :]) if "recipes" in parts else shareable_text(text)


def hardware(arguments: TrainingArguments) -> str:
    """How many devices, of what kind."""
    if arguments.device.type == "cuda":
        return f"{arguments.world_size} x {torch.cuda.get_device_name(arguments.device)}"
    threads = torch.get_num_threads()
    each = f"{threads} thread{'s' * (threads > 1)} of {_processor()}"
    return each if arguments.world_size == 1 else f"{arguments.world_size} x {each}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

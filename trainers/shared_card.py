"""What the cards of all systems say alike: how a model was trained, what its routers did, and where figures lie."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ..hub_cards import render_model_card
from .card_figures import FOLDER, draw_expert_loads

OWN_LICENCE = "apache-2.0"
EXPERT_LOADS = f"{FOLDER}/expert_load.png"
_ROUTING = {
    "entropy": "entropy, nats",
    "load_balance_cv": "imbalance",
    "dead_experts": "experts without tokens",
    "mean_recurrence_steps": "recurrence steps",
    "usage_cost": "usage cost",
}


def readable_time(seconds: float) -> str:
    """`48 seconds`, `12 minutes`, `3.4 hours`."""
    if seconds < 90:
        return f"{seconds:.3g} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def percent(share: float) -> str:
    """A share as a percentage with one digit."""
    return f"{100 * share:.1f} %"


def training_rows(record: dict, batch: str | None = None) -> dict[str, str]:
    """The rows of the table of the training; what a run has not recorded has none."""
    given = record["arguments"]
    rate = f"learning rate {given['learning_rate']:g}"
    schedule = f"{given['lr_scheduler_type']}, warm-up {given.get('warmup_steps', 0):g}"
    rows = {"updates": f"{record['steps']:,}"}
    if batch:
        rows["in one update"] = batch
    rows |= {"optimizer": f"{given['optim']}, {rate}", "schedule": schedule, "seed": str(given["seed"])}
    rows["hardware"] = record["hardware"]
    if record.get("seconds"):
        rows["time"] = readable_time(record["seconds"])
    rows["versions"] = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return rows


def parameter_rows(record: dict) -> dict[str, str]:
    """The rows of the architecture on parameters: all, and of one token where these are fewer."""
    total, active = record["parameters"]["total"], record["parameters"]["active"]
    return {"parameters": f"{total:,}"} | ({"used by one token": f"{active:,}"} if active < total else {})


def routing_table(record: dict) -> list[dict[str, str]]:
    """What the routers did in the last window that was logged: a row for each layer, a cell for each figure."""
    layers: dict[str, dict[str, str]] = {}
    for name, value in record.get("routing", {}).get("metrics", {}).items():
        _, layer, figure = name.split("/")
        if figure in _ROUTING:
            number = layer.removeprefix("layer_")
            layers.setdefault(number, {"layer": number})[_ROUTING[figure]] = f"{value:.3g}"
    return list(layers.values())


def draw_routing(record: dict, folder: str | Path) -> None:
    """Draws the loads of the experts into the folder of the run, if they are known."""
    loads = record.get("routing", {}).get("loads")
    if loads:
        draw_expert_loads(loads, Path(folder, EXPERT_LOADS))


def card_of_run(
    template: str, metadata: dict, record: dict, folder: str | Path, repository: str, revision: str | None, **facts
) -> ModelCard:
    """
    Fills a template with what all systems have, and `facts`.

    Args:
        template (`str`): Its name.
        metadata (`dict`): Of the card; the licence if there is none, the library and the first tags are added.
        record (`dict`): Of the run, with the `license` that was asked for, if one was.
        folder (`str` or `Path`): Where the card will lie, whose pictures it shows.
        repository (`str`): Where the model will be loaded from.
        revision (`str`, *optional*): The revision to pin.
        facts: What else the template asks for.
    """
    metadata = {"license": record.get("license", OWN_LICENCE), "library_name": "transformers", **metadata}
    metadata["tags"] = ["mixturekit", *metadata["tags"]]
    pictures = {path.stem: f"{FOLDER}/{path.name}" for path in sorted(Path(folder, FOLDER).glob("*.png"))}
    return render_model_card(
        template,
        metadata,
        model_name=Path(repository).resolve().name,
        repository=repository,
        revision=revision,
        parameters=f"{record['parameters']['total']:,}",
        command=_in_lines(record["command"]) if record.get("command") else None,
        licence=metadata["license"],
        routing=routing_table(record),
        pictures=pictures,
        **facts,
    )


def episode_result(environment: str, metric: str, name: str, value: float) -> EvalResult:
    """What the Hub's index gets to know of episodes in an environment."""
    return EvalResult("reinforcement-learning", environment, environment, metric, value, metric_name=name)


def policy_metadata(tags: list[str], repository: str, results: list[EvalResult]) -> dict:
    """The metadata of a policy that acts, and its results by [`episode_result`], if there are some."""
    metadata = {"pipeline_tag": "reinforcement-learning", "tags": ["moe", *tags, "custom_code"]}
    if results:
        metadata |= {"metrics": [results[0].metric_type], "model_name": Path(repository).resolve().name}
        metadata["eval_results"] = results
    return metadata


def _in_lines(command: str, width: int = 110) -> str:
    """A command broken before its options, as for a shell."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)


def on_hub(name: str | None) -> bool:
    """Whether `name` is that of a repository, and not of a file or folder here."""
    return bool(name) and name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).exists()

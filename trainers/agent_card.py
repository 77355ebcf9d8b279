"""The model card of an agent that a run over several games has trained."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from transformers import TrainerState

from ..modeling import TieredMoeConfig
from .card_figures import FOLDER, draw_curve
from .continual_log import METRICS, read_lines
from .publishing import CARD
from .shared_card import card_of_run, episode_result, parameter_rows, policy_metadata, training_rows
from .training_record import save_training_record, training_record

CURVES = {"charts/episodic_return": "return in training", "losses/entropy": "entropy, nats"}


def agent_record(agent, config, results: dict) -> dict:
    """
    What [`card_of_agent`] needs to know of a run, for JSON.

    Args:
        agent ([`TieredMoeForActorCritic`]): The trained agent.
        config ([`ContinualPpoConfig`]): Of the run.
        results (`dict`): By [`continual_results`].
    """
    names = ("games", "phases", "random_returns", "evaluations", "metrics")
    data = {name: results[name] for name in names if name in results}
    data |= {"frames": results["steps"], "num_envs": results["settings"]["games"]["num_envs"]}
    state = TrainerState(global_step=results["updates"], log_history=[])
    record = training_record("tiered_moe", agent, config, state, data)
    # With the experts, which the agent does not hold where they are in a store.
    counts = {"total": results["parameters"]["total"], "active": results["parameters"]["active"]}
    return record | {"parameters": counts, "seconds": results["seconds"]}


def write_agent_card(agent, config, results: dict) -> None:
    """Saves record, curve and card to the folder of a run."""
    folder = Path(config.output_dir)
    record = agent_record(agent, config, results)
    save_training_record(record, folder)
    lines = [line | {"step": line["update"]} for line in read_lines(folder / METRICS)]
    draw_curve(lines, CURVES, folder / FOLDER / "training.png")
    card_of_agent(record, agent.config, folder, str(folder)).save(folder / CARD)


def card_of_agent(
    record: dict, config: TieredMoeConfig, folder: str | Path, repository: str, revision: str | None = None
) -> ModelCard:
    """
    The card of a run that has been recorded.

    Args:
        record (`dict`): By [`agent_record`].
        config ([`TieredMoeConfig`]): Of the agent.
        folder (`str` or `Path`): Where the card will lie, whose pictures it shows.
        repository (`str`): Where the agent will be loaded from.
        revision (`str`, *optional*): The revision to pin.
    """
    data = record["data"]
    played = data["evaluations"][-1] if data["evaluations"] else []
    tags = ["atari", "continual-learning", "ppo", "tiered_moe"]
    several = len(data["phases"]) > 1
    experts = "one feed-forward layer" if config.num_experts == 1 else f"{config.num_experts:,} experts"
    return card_of_run(
        "tiered_agent",
        policy_metadata(tags, repository, [_index_entry(entry) for entry in played]),
        record,
        folder,
        repository,
        revision,
        games=data["games"],
        order="one game after another" if several else "all games at once" if data["games"][1:] else "this game",
        num_experts=experts,
        frame_size=config.frame_size,
        architecture=_architecture(record, config),
        training=_training(record),
        results=_results(data),
        retention=_retention(data),
    )


def _architecture(record: dict, config: TieredMoeConfig) -> dict[str, str]:
    return {
        **parameter_rows(record),
        "layers, width": f"{config.num_layers}, {config.expert_dim}",
        "experts of a layer, of a token": f"{config.num_experts}, {config.top_k}",
        "width inside an expert": f"{config.expert_hidden_dim}",
        "steps of context": f"{config.context_len} in each layer, {config.tokens_per_step} tokens a step",
        "the router sees": config.routing_condition,
    }


def _training(record: dict) -> dict[str, str]:
    data = record["data"]
    rows = {"games": " → ".join("+".join(phase) for phase in data["phases"]), "steps": f"{data['frames']:,}"}
    return rows | training_rows(record, f"{data['num_envs']} environments")


def _results(data: dict) -> list[dict[str, str]]:
    if not data["evaluations"]:
        return []
    rows = []
    for number, game in enumerate(data["games"]):
        phase = next(n for n, games in enumerate(data["phases"]) if game in games)
        learned, end = (data["evaluations"][place][number] for place in (phase + 1, -1))
        human = data["metrics"]["human_normalised"][number]
        rows.append(
            {
                "game": game,
                "random": f"{data['random_returns'][number]:.2f}",
                "learned": f"{learned['return']:.2f} ± {learned['return_error']:.2f}",
                "end": f"{end['return']:.2f} ± {end['return_error']:.2f}",
                "human": "-" if human is None else f"{human:.2f}",
            }
        )
    return rows


def _retention(data: dict) -> dict[str, str]:
    metrics = data.get("metrics", {})
    names = {"average_forgetting": "average forgetting", "final_score": "score at the end"}
    return {label: f"{metrics[name]:.2f}" for name, label in names.items() if metrics.get(name) is not None}


def _index_entry(record: dict) -> EvalResult:
    name = f"mean return of {record['episodes']} episodes"
    return episode_result(record["game"], "return", name, round(record["return"], 4))

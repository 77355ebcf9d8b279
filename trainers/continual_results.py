"""What a run over several games has measured, as JSON: the retention matrix and all that follows from it."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .atari_scores import human_normalised
from .continual_metrics import (
    area_under_curve,
    average_forgetting,
    backward_transfer,
    isolated_forgetting,
    normalise,
    own_reference,
    zero_shot_transfer,
)
from .training_record import hardware
from .whole_files import write_whole_text

RESULTS = "continual_results.json"


def continual_results(trainer, agent_arguments: dict) -> dict:
    """
    The results of a run, finished or not.

    Args:
        trainer ([`ContinualPpoTrainer`]): After its training.
        agent_arguments (`dict`): What the agent was built by.
    """
    progress, agent = trainer.progress, trainer.agent
    experts = sum(part.numel() for module in trainer.experts.modules for part in module.parameters())
    total = sum(part.numel() for part in agent.parameters())
    if trainer.experts.store:
        layout = trainer.experts.store.layout
        experts = (
            agent.config.num_layers
            * agent.config.num_experts
            * sum(int(np.prod(shape)) for _, shape in layout.parameters)
        )
        total += experts
    results = {
        "games": trainer.games.games,
        "phases": trainer.phases,
        "settings": {"agent": agent_arguments, "games": asdict(trainer.games), "training": asdict(trainer.config)},
        "hardware": hardware(trainer.config),
        "parameters": {"total": total, "experts": experts, "active": _active(trainer, total, experts)},
        "updates": progress.updates,
        "steps": progress.steps,
        "random_returns": progress.random_returns,
        "evaluations": progress.evaluations,
        "curves": progress.curves,
        "switches": progress.switches,
        "specialisation": progress.specialisation,
        "expert_counts": progress.expert_counts,
        "memory": _memory(trainer),
    }
    if len(progress.evaluations) > 1:
        results["metrics"] = retention_metrics(results)
    return results


def _active(trainer, total: int, experts: int) -> int:
    config = trainer.agent.config
    return total - experts + experts * config.top_k // config.num_experts


def _memory(trainer) -> dict[str, float]:
    """Bytes of experts with their optimizer's state: where they are now, and if all were in fast memory."""
    config, store = trainer.agent.config, trainer.experts.store
    if store is None:
        fast = sum(3 * part.nbytes for part in trainer.experts.fused)
        return {"fast_bytes": fast, "ram_bytes": 0, "all_bytes": fast}
    record, layers = store.layout.memory_bytes, config.num_layers
    return {
        "fast_bytes": layers * store.config.fast_capacity * record,
        "ram_bytes": layers * store.config.ram_capacity * record,
        "all_bytes": layers * config.num_experts * record,
    }


def retention_metrics(results: dict, reference: dict[str, float] | None = None) -> dict:
    """
    What the retention matrix says.

    Args:
        results (`dict`): Of a run that was evaluated.
        reference (`dict[str, float]`, *optional*): For each game the return that counts as 1, such as that of an agent
            that learned this game alone; if unset, the run's own after it has first learned the game.
    """
    games = results["games"]
    returns = np.array([[record["return"] for record in row] for row in results["evaluations"]])
    random = np.array(results["random_returns"])
    trained = [[games.index(name) for name in phase] for phase in results["phases"]][: len(returns) - 1]
    sequence = [phase[0] for phase in trained] if all(len(phase) == 1 for phase in trained) else []
    if reference is not None:
        scale = np.array([reference[game] for game in games])
    else:
        scale = own_reference(returns, sequence) if sequence else returns[-1]
    scores = normalise(returns, random, scale)
    metrics = {
        "reference": scale.tolist(),
        "scores": _listed(scores),
        # Without a score where the agent that sets the scale is no better than chance.
        "final_score": None if np.isnan(scores[-1]).all() else float(np.nanmean(scores[-1])),
        "human_normalised": [human_normalised(game, value) for game, value in zip(games, returns[-1], strict=True)],
    }
    if sequence:
        metrics |= {
            "average_forgetting": _known(average_forgetting(scores, sequence)),
            "backward_transfer": _known(backward_transfer(scores, sequence)),
            "isolated_forgetting": _listed(isolated_forgetting(returns, sequence)),
            "zero_shot_transfer": _listed(zero_shot_transfer(returns, sequence)),
            "areas": learning_areas(results, scale),
        }
    return metrics


def learning_areas(results: dict, scale: np.ndarray) -> dict[str, float]:
    """For each game the mean normalised return while it was first learned."""
    games, random = results["games"], np.array(results["random_returns"])
    areas = {}
    for number, game in enumerate(games):
        own = [point for point in results["curves"] if point["game"] == game]
        if not own or scale[number] - random[number] <= 1e-9:
            continue
        phase = own[0]["phase"]
        own = [point for point in own if point["phase"] == phase]
        start, length = phase * own[0]["phase_steps"], own[0]["phase_steps"]
        span = scale[number] - random[number]
        curve = [(point["step"] - start, (point["return"] - random[number]) / span) for point in own]
        areas[game] = area_under_curve([(0.0, 0.0), *curve], length)
    return areas


def _listed(matrix: np.ndarray) -> list:
    """A matrix for JSON, which has no nan."""
    return [[_known(value) for value in row] for row in matrix]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def write_results(results: dict, path: Path) -> None:
    """Writes them whole."""
    write_whole_text(path, json.dumps(results, indent=1) + "\n")

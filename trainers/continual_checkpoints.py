"""Where a run over several games is, and checkpoints of all of it: a folder that is whole or not there."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .agent_evaluation import PlayedEpisodes
from .checkpoints import (
    EXPERTS,
    UNFINISHED,
    parameters_digest,
    publish_checkpoint,
    rotate_checkpoints,
    seal_checkpoint,
)
from .game_rollout import Memory

if TYPE_CHECKING:
    from .continual_ppo_trainer import ContinualPpoTrainer

STATE = "trainer_state.json"
# A checkpoint and a run that goes on from it must agree on these.
_FIXED = ("num_steps", "segment_len", "num_minibatches", "update_epochs", "optimizer", "expert_learning_rule", "seed")
_FIXED_GAMES = ("games", "steps_per_game", "cycles", "interleaved", "preprocessing", "num_envs")


@dataclass
class ContinualProgress:
    """
    What a run has done and measured.

    Args:
        phase (`int`), phase_updates (`int`): The phase that comes next or is under way, and its updates so far.
        updates (`int`), steps (`int`), seconds (`float`): Of all phases, evaluations left out.
        random_returns (`list[float]`): Of random actions, by game.
        evaluations (`list[list[dict]]`): Of the agent before any game and after each phase, a record for each game.
        curves (`list[dict]`): Training returns: `phase`, `game`, `step`, `phase_steps` (steps of a phase), `return`.
        switches (`list[dict]`): What the beginning of each phase has cost.
        specialisation (`list[dict]`): Of each layer, at the last evaluation.
        expert_counts (`list`): Tokens of each game, layer and expert at the last evaluation.
        series (`list[dict]`): Hit rates and stalls of each update of the phase under way.
    """

    phase: int = 0
    phase_updates: int = 0
    updates: int = 0
    steps: int = 0
    seconds: float = 0.0
    random_returns: list = field(default_factory=list)
    evaluations: list = field(default_factory=list)
    curves: list = field(default_factory=list)
    switches: list = field(default_factory=list)
    specialisation: list = field(default_factory=list)
    expert_counts: list = field(default_factory=list)
    series: list = field(default_factory=list)

    def add_returns(self, finished: list[tuple[str, float]], phase_steps: int) -> None:
        """Takes the episodes `(game, return)` that ended in an update."""
        for game in sorted({game for game, _ in finished}):
            mean = float(np.mean([value for other, value in finished if other == game]))
            place = {"phase": self.phase, "game": game, "step": self.steps, "phase_steps": phase_steps}
            self.curves.append(place | {"return": mean})

    def note_update(self, figures: dict[str, float]) -> None:
        """Keeps of an update what tells how a store warms up."""
        names = ("hit_rate", "stall_seconds")
        kept = {
            f"{phase}_{name}": figures[f"store/{phase}/{name}"]
            for phase in ("acting", "updating")
            for name in names
            if f"store/{phase}/{name}" in figures
        }
        if kept:
            self.series.append(kept | {"seconds": figures["time/acting"] + figures["time/updating"]})

    def finish_switch(self) -> dict[str, float]:
        """Adds to the phase that ends its stalls, and how long it took until the fast tier was warm; its figures."""
        series, self.series = self.series, []
        if series:
            self._measure_stalls(series)
        return {name: value for name, value in self.switches[-1].items() if name not in ("phase", "games")}

    def _measure_stalls(self, series: list[dict]) -> None:
        stall = [one["acting_stall_seconds"] + one["updating_stall_seconds"] for one in series]
        rates = [one["updating_hit_rate"] for one in series]
        steady = float(np.mean(rates[-max(1, len(rates) // 4) :]))
        warm = next((n for n, rate in enumerate(rates) if rate >= 0.95 * steady), len(rates))
        self.switches[-1] |= {
            "stall_ms": 1000 * max(0.0, stall[0] - float(np.median(stall))),
            "stall_ms_per_update": 1000 * float(np.median(stall)),
            "updates_until_warm": warm,
            "seconds_until_warm": float(sum(one["seconds"] for one in series[:warm])),
            "acting_hit_rate": float(np.mean([one["acting_hit_rate"] for one in series])),
            "updating_hit_rate": float(np.mean(rates)),
        }

    def add_evaluation(self, played: list[PlayedEpisodes]) -> None:
        """Takes the episodes of all games."""
        self.evaluations.append([episodes.record() for episodes in played])
        self.expert_counts = [episodes.counts.sum(axis=0).tolist() for episodes in played]


def save_checkpoint(trainer: "ContinualPpoTrainer") -> Path:
    """
    Writes `checkpoint-{updates}` into the output folder; every process has to call it.

    The folder has its name only once all files are in it, so that a process that is killed leaves none in part.
    """
    config, accelerator = trainer.config, trainer.config.accelerator
    path = Path(config.output_dir, f"checkpoint-{trainer.progress.updates}")
    partial = path.with_name(f"{UNFINISHED}-{path.name}")
    first = config.process_index == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    own = {"generator": trainer.generator.get_state(), "torch": torch.get_rng_state()}
    record: dict = {}
    if trainer.player is not None:
        own |= {f"player/{name}": part for name, part in trainer.player.memory.to_tensors().items()}
        if trainer.environments.can_be_saved:
            own |= _environment_tensors(trainer, record)
    for name, memory in _memories(trainer).items():
        own |= {f"{name}/{key}": part for key, part in memory.to_tensors().items()}
    name = f"process_{config.process_index}"
    save_file({key: part.contiguous() for key, part in own.items()}, partial / f"{name}.safetensors")
    _write(partial / f"{name}.json", record | {"recent_returns": list(trainer.recent_returns)})
    if first:
        shared = trainer.experts.save(partial)
        shared |= {"progress": asdict(trainer.progress), "config": asdict(config), "games": asdict(trainer.games)}
        shared["processes"] = config.world_size
        trainer.agent.config.save_pretrained(partial)
        _write(partial / STATE, shared)
    elif trainer.experts.store:
        # So that the folder opens with what the checkpoint has.
        trainer.experts.store.checkpoint()
    accelerator.wait_for_everyone()
    if first:
        seal_checkpoint(partial, _parameters(trainer))
        publish_checkpoint(partial, path)
        if trainer.experts.store:
            trainer.experts.store.checkpoint_moved(path / EXPERTS)
        rotate_checkpoints(path, max(1, config.save_total_limit))
    accelerator.wait_for_everyone()
    return path


def load_checkpoint(trainer: "ContinualPpoTrainer", path: Path) -> None:
    """
    Puts a run where a checkpoint was written.

    Games that ship here go on in the middle of their episodes; the emulator's begin new ones, because its vector
    environment cannot be saved.

    Raises:
        ValueError: If the run differs from that of the checkpoint in what decides its course.
        FileNotFoundError: If it was written by fewer processes.
    """
    config = trainer.config
    shared = json.loads((path / STATE).read_text(encoding="utf-8"))
    _check_same(path, shared, trainer)
    files = path / f"process_{config.process_index}.safetensors"
    if shared["processes"] != config.world_size or not files.is_file():
        raise FileNotFoundError(
            f"{path} was written by {shared['processes']} processes, and there are {config.world_size}: resume with "
            "as many as before."
        )
    trainer.experts.load(path, shared)
    trainer.progress = ContinualProgress(**shared["progress"])
    own, record = load_file(files), json.loads(files.with_suffix(".json").read_text(encoding="utf-8"))
    trainer.recent_returns.extend(record["recent_returns"])
    trainer.generator.set_state(own.pop("generator"))
    torch.set_rng_state(own.pop("torch"))
    for name, memory in _memories(trainer).items():
        memory.load_tensors(_part(own, f"{name}/"), config.device)
    if player := _part(own, "player/"):
        trainer.open_games()
        if trainer.environments.can_be_saved:
            _load_environments(trainer, _part(own, "environments/"), record)
            trainer.player.memory = Memory.from_tensors(
                {name: part.to(config.device) for name, part in player.items()}
            )
            trainer.player.memory.frames = trainer.player.memory.frames.cpu()
            trainer.player.memory.returns = trainer.player.memory.returns.cpu()
        else:
            trainer.player.begin()
    reached = trainer.progress.phase > 0
    if config.freeze_router == "always" or (config.freeze_router == "after_first_game" and reached):
        trainer.freeze_router()


def _memories(trainer: "ContinualPpoTrainer") -> dict:
    return {"detector": trainer.detector_memory, "replay": trainer.replay, "elastic": trainer.elastic}


def _environment_tensors(trainer: "ContinualPpoTrainer", record: dict) -> dict[str, Tensor]:
    tensors, record["random"] = {}, []
    for number, state in enumerate(trainer.environments.state_dict()):
        record["random"].append(state.pop("random"))
        tensors |= {f"environments/{number}/{name}": torch.from_numpy(part) for name, part in state.items()}
    return tensors


def _load_environments(trainer: "ContinualPpoTrainer", tensors: dict[str, Tensor], record: dict) -> None:
    states = []
    for number, random in enumerate(record["random"]):
        own = {name: part.numpy() for name, part in _part(tensors, f"{number}/").items()}
        states.append(own | {"random": random})
    trainer.environments.load_state_dict(states)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}


def _check_same(path: Path, shared: dict, trainer: "ContinualPpoTrainer") -> None:
    pairs = [(name, shared["config"].get(name), getattr(trainer.config, name)) for name in _FIXED]
    pairs += [(name, shared["games"][name], getattr(trainer.games, name)) for name in _FIXED_GAMES]
    differing = [f"{name}={there} there, {here} here" for name, there, here in pairs if there != here]
    if differing:
        raise ValueError(f"{path} cannot be resumed by this run: {'; '.join(differing)}.")


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _parameters(trainer: "ContinualPpoTrainer") -> str:
    config = trainer.agent.config
    digest = parameters_digest((name, tuple(part.shape)) for name, part in trainer.agent.state_dict().items())
    return f"{config.model_type} {config.num_experts} {digest}"

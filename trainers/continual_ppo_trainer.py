"""PPO over games one after another (or all at once), with experts in memory or in a store.

A phase is the learning of one game; an update is a rollout in all environments and some epochs over it. After each
phase every game is played for the retention matrix, and a checkpoint has everything that the next phase needs.
"""

import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from .agent_evaluation import PlayedEpisodes, play_at_random, play_episodes
from .agent_experts import AgentExperts, PrefetchTrial
from .atari import GameEnvironments
from .continual_checkpoints import ContinualProgress, load_checkpoint, save_checkpoint
from .continual_log import ContinualLog
from .continual_ppo_config import AgentArguments, ContinualPpoConfig, GameArguments
from .continual_remedies import DetectorMemory, ElasticWeights, ReplayMemory
from .durable_training import SignalListener
from .expert_gradients import exchange_gradients, mean_over_processes
from .expert_specialisation import specialisation
from .game_rollout import GamePlayer, Segments
from .local_learning import expert_inputs, replace_gradients

# Between the seeds of two phases, and of two processes.
_PHASE_STRIDE, _PROCESS_STRIDE = 10_007, 1_000_003
# Of the detector with each update, which cost little beside those of the agent.
_DETECTOR_STEPS = 8


class ContinualPpoTrainer:
    """
    Trains an agent on the games of `games`, phase after phase.

    Args:
        experts ([`AgentExperts`]): The agent, its optimizer and its store.
        config ([`ContinualPpoConfig`]): Of the learning.
        games ([`GameArguments`]): Of the phases.
        arguments ([`AgentArguments`]): How experts are prefetched.
    """

    def __init__(
        self, experts: AgentExperts, config: ContinualPpoConfig, games: GameArguments, arguments: AgentArguments
    ):
        config.check_segments(games.num_envs)
        self.experts, self.agent, self.config = experts, experts.agent, config
        self.games, self.arguments = games, arguments
        self.phases = games.phases()
        # In the agent's configuration, which may know more games than this run.
        self.number = {game: n for n, game in enumerate(self.agent.config.games)}
        steps = games.num_envs * config.num_steps * config.world_size
        self.steps_per_update = steps
        self.updates_per_phase = max(1, games.steps_of_phase() // steps)
        set_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed + _PROCESS_STRIDE * config.process_index)
        self.detector_memory = DetectorMemory(len(self.number), config.detector_memory, self.generator)
        self.replay = ReplayMemory(config.replay_segments, self.generator)
        named = {name: part for name, part in self.agent.named_parameters() if any(part is p for p in experts.rest)}
        self.elastic = ElasticWeights(named)
        self.progress = ContinualProgress()
        self.player: GamePlayer | None = None
        self.environments: GameEnvironments | None = None
        self.recent_returns: deque[float] = deque(maxlen=100)
        self.log = ContinualLog(config)
        self._bar = tqdm(disable=True)
        self._signals = SignalListener()
        self._trial: PrefetchTrial | None = None
        self._last_segments: Segments | None = None

    def train(self, checkpoint: str | Path | None = None) -> ContinualProgress:
        """
        Learns all phases, or what is left of them.

        Args:
            checkpoint (`str` or `Path`, *optional*): Of this run, to go on from.

        Returns:
            [`ContinualProgress`]: What was measured.

        Raises:
            SystemExit: After SIGTERM or SIGINT, and a checkpoint.
        """
        if checkpoint:
            load_checkpoint(self, Path(checkpoint))
            self.log.resume(self.progress.updates, self._lacks_evaluation())
            if self.player is not None and self.progress.phase_updates == 0:
                self._foretell()
        with self._progress_bar() as self._bar:
            if not checkpoint and self.games.eval_episodes:
                self._bar.set_description("playing at random")
                self.progress.random_returns = [self._random_return(game) for game in self.games.games]
            self._signals.listen()
            try:
                self._learn_phases()
            finally:
                self._signals.restore()
                self.log.close()
        return self.progress

    def _learn_phases(self) -> None:
        if self._lacks_evaluation():
            self._evaluate()
        while self.progress.phase < len(self.phases):
            if self.player is None:
                self._begin_phase()
            while self.progress.phase_updates < self.updates_per_phase:
                if self._stops_here():
                    return
                self._update_once()
            self._end_phase()

    def _progress_bar(self) -> tqdm:
        """Over the updates of all phases, in the first process."""
        config = self.config
        total = len(self.phases) * self.updates_per_phase
        return tqdm(
            total=min(total, config.max_updates) if config.max_updates is not None else total,
            initial=self.progress.updates,
            unit="update",
            disable=config.disable_tqdm or config.process_index != 0,
        )

    # --- phases ---------------------------------------------------------------------------------------------------

    def open_games(self) -> None:
        """Opens the environments of the phase, without a step in them."""
        progress, config = self.progress, self.config
        games = self.phases[progress.phase]
        seed = config.seed + _PHASE_STRIDE * progress.phase + _PROCESS_STRIDE * config.process_index
        arguments = self.games
        self.environments = GameEnvironments(
            games, arguments.num_envs, seed, arguments.preprocessing, arguments.env_threads
        )
        ids = torch.tensor([self.number[games[n]] for n in self.environments.game_of_row])
        self.player = GamePlayer(self.agent, self.environments, ids, self.generator, config.device)
        self.experts.set_task("+".join(games))

    def _begin_phase(self) -> None:
        started = time.perf_counter()
        self.open_games()
        self.player.begin()
        self.recent_returns.clear()
        self.progress.phase_updates = 0
        self.progress.switches.append({"phase": self.progress.phase, "games": self.phases[self.progress.phase]})
        self.experts.take_stats()
        self._foretell()
        self.progress.switches[-1]["open_seconds"] = time.perf_counter() - started
        if self.config.freeze_router == "always":
            self.freeze_router()

    def _foretell(self) -> None:
        """Asks for the experts that the game is thought to need."""
        if self.experts.store:
            frames = self.player.memory.frames.to(self.config.device)
            self._trial = PrefetchTrial(self.experts, self.arguments.prefetch, frames)

    def _end_phase(self) -> None:
        progress, config = self.progress, self.config
        games = sorted(self.number[game] for game in self.phases[progress.phase])
        last = progress.phase == len(self.phases) - 1
        if config.replay_coef > 0 and not last:
            self.replay.keep(self.agent, self._last_segments)
        if config.ewc_coef > 0 and not last:
            self.elastic.consolidate(self.agent, self._last_segments)
            self.experts.optimizer.zero_grad()
        if config.freeze_experts:
            # What all processes have used, so that they freeze the same.
            usage = config.accelerator.reduce(self.agent.model.detector.usage[games], "mean")
            for own in usage.cpu():
                self.experts.freeze(most_used(own, config.freeze_share))
        if config.freeze_router == "after_first_game":
            self.freeze_router()
        figures = {f"switch/{name}": value for name, value in progress.finish_switch().items()}
        self.log.write(figures | {"update": progress.updates, "step": progress.steps})
        self.environments.close()
        self.player = self.environments = None
        progress.phase += 1
        progress.phase_updates = 0
        # First of all: to play every game takes long, and can be made up for.
        save_checkpoint(self)
        if self._lacks_evaluation():
            self._evaluate()

    def freeze_router(self) -> None:
        """The routers learn no more."""
        for layer in self.agent.model.layers:
            layer.mlp.gate.requires_grad_(False)

    def _stops_here(self) -> bool:
        stopped = self._signals.agree(self.config.accelerator)
        if not stopped and (self.config.max_updates is None or self.progress.updates < self.config.max_updates):
            return False
        checkpoint = save_checkpoint(self)
        if stopped:
            self._signals.end_run(checkpoint, self.config.process_index == 0)
        return True

    # --- one update -----------------------------------------------------------------------------------------------

    def _update_once(self) -> None:
        config, progress, started = self.config, self.progress, time.perf_counter()
        left = 1 - progress.phase_updates / self.updates_per_phase
        self.experts.set_learning_rate(config.learning_rate * (left if config.anneal_lr else 1.0))
        self.agent.eval()
        segments = self.player.play(config.num_steps, config.segment_len, config.gamma, config.gae_lambda)
        acted = time.perf_counter()
        figures = {f"store/acting/{name}": value for name, value in self.experts.take_stats().items()}
        if progress.phase_updates == 0 and self._trial is not None:
            progress.switches[-1] |= self._trial.finish(self.player.used_experts())
            self._trial = None
        self.player.remember_routes()
        self.agent.train()
        figures |= self.learn(segments) | self._teach_detector(segments)
        figures |= {f"store/updating/{name}": value for name, value in self.experts.take_stats().items()}
        self._last_segments = segments
        progress.updates += 1
        progress.phase_updates += 1
        progress.steps += self.steps_per_update
        ended = time.perf_counter()
        progress.seconds += ended - started
        self.recent_returns.extend(value for _, value in self.player.finished)
        if self.player.finished:
            finished = [(self.agent.config.games[game], value) for game, value in self.player.finished]
            progress.add_returns(finished, self.updates_per_phase * self.steps_per_update)
            self.player.finished = []
        if self.recent_returns:
            figures["charts/episodic_return"] = float(np.mean(self.recent_returns))
        figures |= {
            "charts/SPS": self.steps_per_update / (ended - started),
            "charts/learning_rate": self.experts.optimizer.param_groups[-1]["lr"],
            "time/acting": acted - started,
            "time/updating": ended - acted,
        }
        progress.note_update(figures)
        games = "+".join(self.phases[progress.phase])
        returns = f"return {figures['charts/episodic_return']:.2f}" if self.recent_returns else ""
        self._bar.set_description(games, refresh=False)
        self._bar.set_postfix_str(returns, refresh=False)
        self._bar.update()
        if progress.updates % config.logging_steps == 0:
            self.log.write(figures | {"update": progress.updates, "step": progress.steps, "game": games})
        if progress.updates % config.save_steps == 0 and progress.phase_updates < self.updates_per_phase:
            save_checkpoint(self)

    def learn(self, segments: Segments) -> dict[str, float]:
        """
        Some epochs of PPO over what was played.

        Returns:
            `dict[str, float]`: Losses and what else CleanRL logs.
        """
        config, sums, count = self.config, {}, 0
        size = len(segments) // config.num_minibatches
        for _ in range(config.update_epochs):
            order = torch.randperm(len(segments), generator=self.generator).to(config.device)
            for rows in order.split(size):
                figures = self._minibatch(segments.select(rows))
                count += 1
                for name, value in figures.items():
                    sums[name] = sums.get(name, 0.0) + value
            # Of the last minibatch, as in CleanRL, and of all processes, which have to stop together.
            if config.target_kl is not None:
                divergence = config.accelerator.reduce(figures["losses/approx_kl"].clone(), "mean")
                if divergence.item() > config.target_kl:
                    break
        means = {name: value.item() / count for name, value in sums.items()}
        returns, values = segments.returns, segments.values
        spread = returns.var(correction=0)
        if spread > 0:
            means["losses/explained_variance"] = (1 - (returns - values).var(correction=0) / spread).item()
        return means

    def _minibatch(self, batch: Segments) -> dict[str, Tensor]:
        config = self.config
        with expert_inputs(self.experts.modules if config.learns_locally else ()) as seen:
            outputs = self.agent(
                **batch.inputs, state=batch.state, output_router_logits=True, output_router_indices=True
            )
        loss, figures = ppo_loss(outputs, batch, config)
        balancing = self.agent.balancing_loss(outputs, lambda part: config.accelerator.reduce(part, "mean"))
        loss = loss + self.agent.config.router_aux_loss_coef * balancing
        figures["losses/balancing"] = balancing.detach()
        current = {self.number[game] for game in self.phases[self.progress.phase]}
        if config.ewc_coef > 0 and (penalty := self.elastic.penalty()) is not None:
            loss = loss + config.ewc_coef * penalty
            figures["losses/ewc"] = penalty.detach()
        loss.backward()
        # After the backward pass above, which lets go of its experts: a store may lack room for those of both.
        if config.replay_coef > 0 and (replayed := self.replay.loss(self.agent, len(batch), current)) is not None:
            (config.replay_coef * replayed).backward()
            figures["losses/replay"] = replayed.detach()
        if config.learns_locally:
            advantages = normalised(batch.advantages)
            replace_gradients(self.experts, config.expert_learning_rule, seen, batch, advantages, self.generator)
        exchange_gradients(self.experts)
        figures["losses/grad_norm"] = self.experts.step()
        return figures

    def _teach_detector(self, segments: Segments) -> dict[str, float]:
        """Learns to name the game, and says how often it was named rightly before."""
        frames, games = segments.inputs["frames"][:, 0], segments.inputs["environment_ids"]
        with torch.no_grad():
            _, accuracy = self.agent.model.detector.loss(frames, games)
        self.detector_memory.add(frames, games)
        for _ in range(_DETECTOR_STEPS):
            seen, names = self.detector_memory.batch(2 * len(frames))
            loss, _ = self.agent.model.detector.loss(seen.to(frames.device), names.to(frames.device))
            loss.backward()
            mean_over_processes(list(self.agent.model.detector.parameters()))
            self.experts.detector_optimizer.step()
            self.experts.detector_optimizer.zero_grad()
        return {"detector/accuracy": accuracy.item(), "detector/loss": loss.item()}

    # --- evaluation and checkpoints ---------------------------------------------------------------------------------

    def _lacks_evaluation(self) -> bool:
        """Whether the games have not been played since the last phase."""
        return bool(self.games.eval_episodes) and len(self.progress.evaluations) <= self.progress.phase

    def _evaluate(self) -> None:
        """Plays every game: a row of the retention matrix, and what the experts tell about the game."""
        arguments = self.games
        self._bar.set_description("playing all games")
        with self.experts.set_aside():
            played = [
                play_episodes(
                    self.agent,
                    game,
                    arguments.eval_episodes,
                    arguments.eval_first_seed,
                    arguments.eval_max_steps,
                    arguments.tell_game,
                    num_threads=arguments.env_threads,
                    preprocessing=arguments.preprocessing,
                    progress=not self._bar.disable,
                )
                for game in arguments.games
            ]
        self.progress.add_evaluation(played)
        self.progress.specialisation = expert_specialisation(played)
        figures = {f"eval/{episodes.game}/return": float(episodes.returns.mean()) for episodes in played}
        for layer, figure in enumerate(self.progress.specialisation):
            figures |= {f"specialisation/layer_{layer}/{name}": value for name, value in figure.items()}
        self.log.write(figures | {"update": self.progress.updates, "step": self.progress.steps})

    def _random_return(self, game: str) -> float:
        given = self.games
        count = max(16, given.eval_episodes)
        progress = not self._bar.disable
        episodes = play_at_random(
            game, count, given.eval_first_seed, given.eval_max_steps, given.preprocessing, progress
        )
        return float(episodes.returns.mean())


def ppo_loss(outputs, batch: Segments, config: ContinualPpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """
    The loss of a minibatch, over all processes.

    Args:
        outputs (`TieredMoeActorCriticOutput`): Of the agent as it is now.
        batch ([`Segments`]): What was played, and with it how likely that was.
        config ([`ContinualPpoConfig`]): Coefficients.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The loss, and its parts for the log.
    """
    log_probs = outputs.logits.log_softmax(dim=-1)
    chosen = log_probs.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    log_ratio = chosen - batch.log_probs
    ratio = log_ratio.exp()
    advantages = normalised(batch.advantages) if config.norm_adv else batch.advantages
    clipped = ratio.clamp(1 - config.clip_coef, 1 + config.clip_coef)
    policy_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
    value_loss = (outputs.values - batch.returns).square()
    if config.clip_vloss:
        near = batch.values + (outputs.values - batch.values).clamp(-config.clip_coef, config.clip_coef)
        value_loss = torch.max(value_loss, (near - batch.returns).square())
    value_loss = 0.5 * value_loss.mean()
    # Actions that a game lacks have a probability of 0, whose logarithm is as low as numbers go.
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(dim=-1).mean()
    loss = policy_loss - config.ent_coef * entropy + config.vf_coef * value_loss
    with torch.no_grad():
        figures = {
            "losses/policy_loss": policy_loss.detach(),
            "losses/value_loss": value_loss.detach(),
            "losses/entropy": entropy.detach(),
            # http://joschu.net/blog/kl-approx.html
            "losses/old_approx_kl": (-log_ratio).mean(),
            "losses/approx_kl": ((ratio - 1) - log_ratio).mean(),
            "losses/clipfrac": ((ratio - 1).abs() > config.clip_coef).float().mean(),
        }
    return loss, figures


def normalised(advantages: Tensor) -> Tensor:
    """Advantages of mean 0 and standard deviation 1, over the minibatches of all processes."""
    mean, deviation = advantages.mean(), advantages.std()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = advantages.new_tensor(float(advantages.numel()))
        sums = torch.stack([advantages.sum(), advantages.square().sum(), count])
        torch.distributed.all_reduce(sums)
        mean = sums[0] / sums[2]
        deviation = ((sums[1] - sums[2] * mean.square()) / (sums[2] - 1)).clamp(min=0).sqrt()
    return (advantages - mean) / (deviation + 1e-8)


def most_used(usage: Tensor, share: float) -> Tensor:
    """Which experts of each layer get the first `share` of a game's tokens; `(layers, experts)`, from shares."""
    ordered, experts = usage.sort(dim=-1, descending=True)
    total = ordered.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    before = (ordered.cumsum(dim=-1) - ordered) / total
    return torch.zeros_like(usage, dtype=torch.bool).scatter(-1, experts, (before < share) & (ordered > 0))


def expert_specialisation(played: list[PlayedEpisodes]) -> list[dict[str, float]]:
    """What each layer's experts tell about the game, from episodes of several games; empty for one game."""
    if len(played) < 2:
        return []
    counts = np.concatenate([episodes.counts for episodes in played])
    names = np.concatenate([[episodes.game] * len(episodes.returns) for episodes in played])
    return [specialisation(counts[:, layer], names) for layer in range(counts.shape[1])]

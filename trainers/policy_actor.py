"""A policy acting in many environments at once.

Shapes: batch = environments that act together.
"""

import numpy as np
import torch

from ..modeling import MopForActionPrediction, MopState
from .babyai import Observations


class PolicyActor:
    """
    Chooses actions step by step, without gradient. Each mission is encoded once, so that an actor is good for as long
    as the policy's weights stay as they are.

    Args:
        policy ([`MopForActionPrediction`]): In evaluation mode.
        sample (`bool`, *optional*, defaults to `False`): Whether to sample, and not to take the most probable action.
        seed (*optional*, defaults to 0): Of the samples, whatever `numpy.random.default_rng` takes.
        weight_threshold (`float`, *optional*): Experts of a smaller weight are dropped.
        lesion_largest (`bool`, *optional*, defaults to `False`): Whether the largest expert of each layer is dropped.
        with_routing (`bool`, *optional*, defaults to `False`): Whether `router_weights` holds each step's weights.
    """

    def __init__(
        self,
        policy: MopForActionPrediction,
        *,
        sample: bool = False,
        seed=0,
        weight_threshold: float | None = None,
        lesion_largest: bool = False,
        with_routing: bool = False,
    ):
        self.policy = policy
        self.generator = np.random.default_rng(seed) if sample else None
        self.options = {
            "weight_threshold": weight_threshold,
            "lesion_largest": lesion_largest,
            "output_router_weights": with_routing,
        }
        self.router_weights: tuple[torch.Tensor, ...] = ()  # of each layer (batch, experts)
        # Not the policy's own cache: it tells weights apart by their version, which fused optimizers leave alone.
        self._known: dict[str, torch.Tensor] = {}
        self._missions: list[str] = []
        self._embedded: torch.Tensor | None = None  # (batch, mission)

    @torch.no_grad()
    def __call__(
        self, observations: Observations, is_fresh: np.ndarray, state: MopState
    ) -> tuple[np.ndarray, MopState]:
        """
        Args:
            observations ([`Observations`]): What is seen.
            is_fresh (`np.ndarray` of shape `(batch,)`): Where an episode begins, so that `state` is reset before.
            state ([`MopState`]): After the step before.

        Returns:
            Actions int64 `(batch,)`, and the state after this step.
        """
        device = self.policy.device
        outputs = self.policy(
            images=torch.from_numpy(observations.images)[:, None].to(device),
            directions=torch.from_numpy(observations.directions)[:, None].to(device),
            mission_index=torch.arange(len(observations), device=device)[:, None],
            mission_embeddings=self._embed(observations.missions),
            reset_mask=torch.from_numpy(is_fresh)[:, None].to(device),
            state=state,
            **self.options,
        )
        self.router_weights = tuple(weights[:, 0] for weights in outputs.router_weights or ())
        logits = outputs.logits[:, 0].float()  # (batch, actions)
        if self.generator is None:
            return logits.argmax(-1).cpu().numpy(), outputs.state
        # The largest of logits plus Gumbel noise is a sample of their softmax.
        noise = self.generator.gumbel(size=tuple(logits.shape))
        return (logits.cpu().numpy() + noise).argmax(-1), outputs.state

    def _embed(self, missions: list[str]) -> torch.Tensor:
        """The encoded missions, `(batch, mission)`; most steps have those of the step before."""
        if missions != self._missions:
            missing = [mission for mission in dict.fromkeys(missions) if mission not in self._known]
            if missing:
                encoded = self.policy.encoder.mission(*self.policy.prepare_missions(missing).values())
                self._known.update(zip(missing, encoded, strict=True))
            self._missions = list(missions)
            self._embedded = torch.stack([self._known[mission] for mission in missions])
        return self._embedded

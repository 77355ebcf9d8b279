"""A policy acting in many environments at once.

Shapes: batch = environments that act together.
"""

import numpy as np
import torch

from ..modeling import MopForActionPrediction, MopState
from .babyai import Observations


class PolicyActor:
    """
    Chooses actions step by step, without gradient.

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
        outputs = self.policy.step(
            observations.images,
            observations.directions,
            observations.missions,
            state,
            reset_mask=torch.from_numpy(is_fresh)[:, None].to(self.policy.device),
            **self.options,
        )
        self.router_weights = tuple(weights[:, 0] for weights in outputs.router_weights or ())
        logits = outputs.logits[:, 0].float()  # (batch, actions)
        if self.generator is None:
            return logits.argmax(-1).cpu().numpy(), outputs.state
        # The largest of logits plus Gumbel noise is a sample of their softmax.
        noise = self.generator.gumbel(size=tuple(logits.shape))
        return (logits.cpu().numpy() + noise).argmax(-1), outputs.state

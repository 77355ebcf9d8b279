"""PPO for language models: TRL's `GRPOTrainer` with a critic on the policy's own backbone.

TRL generates, asks the reward functions, keeps the reference and computes the clipped loss. What is added: values of
the states before each token, advantages of each token, the value loss, and routing that is the same in all passes.

Shapes: batch; time, the tokens of a completion; states, time + 1: before each token and after the last.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing

from .advantages import generalized_advantages
from .durable_grpo_trainer import DurableGRPOTrainer
from .expert_adapters import merged_adapters
from .policy_value_model import PREFIX, add_value_head, load_value_head, save_value_head, split_value_head
from .ppo_card import CURVES, card_of_ppo_policy, ppo_record
from .ppo_config import PPOConfig
from .publishing import PublishingCallback, write_card
from .router_replay import RouterReplay, check_replayable, keep_routing_deterministic
from .zero_offload import prepare_for_zero3

# After so many rollouts in which all rewards were the same, somebody should know.
SILENT_ROLLOUTS = 10

logger = logging.getLogger(__name__)


class PPOTrainer(DurableGRPOTrainer):
    """
    Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) of a causal language model.

    The arguments are those of TRL's `GRPOTrainer`. Beside its metrics, it logs `value/loss`, `value/mean`,
    `value/clip_fraction`, `value/explained_variance`, `advantage/mean` and `advantage/std` (before normalisation),
    `return/mean`, `beta`, `router_agreement` and `tokens_per_second` (tokens of completions).

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`): The policy.
        reward_funcs: As in TRL.
        args ([`PPOConfig`]): The configuration.
        value_head (`str`, *optional*): Folder of an earlier run whose value head to begin with.
        kwargs: Passed to `GRPOTrainer`.

    Example:

    ```python
    >>> trainer = PPOTrainer("Qwen/Qwen3-0.6B", correctness_reward, PPOConfig("out"), train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "ppo", "mixturekit"]
    _name = "PPO"

    def __init__(
        self, model, reward_funcs=None, args: PPOConfig | None = None, value_head: str | None = None, **kwargs
    ):
        super().__init__(model, reward_funcs, args if args is not None else PPOConfig("out"), **kwargs)
        policy = self._policy
        if getattr(policy, "is_loaded_in_4bit", False):
            # TRL has cast the adapters to half precision, in which small steps round to nothing.
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if self.is_deepspeed_enabled:
            prepare_for_zero3(policy, self.accelerator.state.deepspeed_plugin)
        add_value_head(policy, backbone_gradient=self.args.value_backbone_gradient)
        if self.ref_model is not None:
            add_value_head(self._unwrapped(self.ref_model), with_critic=False)
        if value_head is not None:
            load_value_head(policy.value_head, value_head)
        routers = keep_routing_deterministic(policy)
        if self.args.freeze_router:
            for router in routers:
                router.requires_grad_(False)
        if self.args.router_replay != "off":
            check_replayable(policy)
        self._replay = RouterReplay(routers) if self.args.router_replay != "off" else None
        self._in_rollout = False
        self._passes: dict[str, list] = {}  # what the policy and the reference returned last
        self._choices: Tensor | None = None
        self._features: Tensor | None = None
        self._rewards: Tensor | None = None  # of all processes (batch * processes,), as is whether there are any
        self._is_scored: Tensor | None = None
        self._silent_rollouts = 0
        self._tokens, self._counting_since = 0.0, time.perf_counter()
        self.card_facts = {}
        self.add_callback(PublishingCallback(self))

    @property
    def _policy(self):
        return self._unwrapped(self.model)

    # Rollout

    def _generate_single_turn(self, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            if self.use_vllm:
                # It would be sent to the server, which knows no such weight.
                stack.enter_context(_without_value_head(self._policy))
            else:
                model = self.accelerator.unwrap_model(self.model)
                stack.enter_context(merged_adapters(model, keep_on=self.accelerator.device))
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._is_scored = ~rewards.isnan().all(dim=1)
        return rewards

    def _generate_and_score_completions(self, inputs):
        self._in_rollout, self._passes, self._choices = True, {}, None
        mode = "train" if self.model.training else "eval"
        try:
            batch = super()._generate_and_score_completions(inputs)
            if "policy" not in self._passes and self._needs_policy_pass:
                self._score(batch, mode)
        finally:
            self._in_rollout = False
        if self._choices is not None:
            batch["router_choices"] = self._choices
        if self.args.critic_features == "ref":
            batch["value_features"] = torch.cat([output.features for output in self._passes["reference"]])
        batch |= self._advantages(batch, mode)
        self._watch_rewards()
        self._adapt_beta(batch, mode)
        return batch

    @property
    def _needs_policy_pass(self) -> bool:
        """Whether the rollout has to be scored even where TRL knows that the policy is still the one that played."""
        arguments = self.args
        needs_divergence = arguments.kl_in == "reward" or arguments.kl_target is not None
        return arguments.critic_features == "policy" or needs_divergence or self._replay is not None

    def _score(self, batch: dict, mode: str) -> None:
        arguments = self.args
        size = arguments.per_device_train_batch_size if mode == "train" else arguments.per_device_eval_batch_size
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, arguments.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(self.model, ids, mask, batch["completion_ids"].shape[1], size)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        reference = self._is_reference(model)
        call = _RecordedCall(
            model,
            num_states=logits_to_keep + 1,
            return_features=reference and self.args.critic_features == "ref",
            value_features=None if self._in_rollout else self._features,
        )
        records = self._replay is not None and self._in_rollout and not reference
        if records:
            self._replay.record()
        result = super()._get_per_token_logps_and_entropies(
            call, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
        )
        if records:
            self._choices = self._replay.recorded(len(input_ids))
        self._passes["reference" if reference else "policy"] = call.outputs
        return result

    def _is_reference(self, model: nn.Module) -> bool:
        if model is self.ref_model:
            return True
        layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
        layer = next(layers, None)
        return layer is not None and (layer.disable_adapters or list(layer.active_adapters) == ["ref"])

    def _advantages(self, batch: dict, mode: str) -> dict[str, Tensor]:
        """
        Advantages `(batch, time)`; the values that they come from, the returns to learn, both `(batch, states)`; which
        states have one; and how many these are in all processes.
        """
        mask = self._loss_mask(batch).bool() & self._local(self._is_scored, batch)[:, None]
        values = self._rollout_values(batch)
        # The state after the last token that counts; tools and environments may have put others between.
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1, keepdim=True)
        states = torch.zeros_like(values, dtype=torch.bool)
        score = self._scores(batch, mode)
        if self.args.critic_level == "token":
            states[:, :-1] = mask
            # Where nothing counts, the reward lands on a token that does not.
            rewards = torch.zeros_like(mask, dtype=values.dtype).scatter_(1, (last - 1).clamp(min=0), score[:, None])
            rewards = rewards - self._token_penalty(batch, mask)
            advantages, returns = generalized_advantages(rewards, values[:, :-1], mask, self.args.gamma, self.args.lam)
            returns = nn.functional.pad(returns, (0, 1))
        else:
            states.scatter_(1, torch.zeros_like(last) if self.args.critic_level == "prompt" else last, True)
            states &= mask.any(dim=1, keepdim=True)
            returns = (score - self._token_penalty(batch, mask).sum(dim=1))[:, None].expand_as(values) * states
            value = (values * states).sum(dim=1, keepdim=True)
            advantages = (returns.sum(dim=1, keepdim=True) - value) * mask
        self._log_values(values, returns, states, advantages, mask, mode)
        if self.args.normalize_advantages:
            mean, deviation = self._moments(advantages, mask)
            advantages = (advantages - mean) / (deviation + 1e-8) * mask
        return {
            "advantages": advantages,
            "state_values": values,
            "returns": returns,
            "value_mask": states,
            "num_values_in_batch": self.accelerator.gather(states.sum()).sum(),
        }

    def _rollout_values(self, batch: dict) -> Tensor:
        outputs = self._passes["reference" if self.args.critic_features == "ref" else "policy"]
        if outputs[0].state_values is not None:
            return torch.cat([output.state_values for output in outputs])
        # A reference that is a model of its own has no critic.
        with torch.no_grad():
            return self._policy.value_head(batch["value_features"])

    def _scores(self, batch: dict, mode: str) -> Tensor:
        """The reward of each completion `(batch,)`, that of its group's mean subtracted where there are several."""
        if (self.num_generations if mode == "train" else self.num_generations_eval) > 1:
            return batch["advantages"]
        # The group of one says nothing about variance.
        self._metrics[mode].pop("frac_reward_zero_std", None)
        return self._local(self._rewards, batch)

    def _local(self, gathered: Tensor, batch: dict) -> Tensor:
        """The part of this process."""
        first = self.accelerator.process_index * len(batch["prompt_ids"])
        return gathered[first : first + len(batch["prompt_ids"])]

    def _token_penalty(self, batch: dict, mask: Tensor) -> Tensor:
        """What the KL divergence costs each token, where it is part of the reward."""
        if self.args.kl_in == "loss":
            return torch.zeros_like(mask, dtype=torch.float32)
        return self.beta * self._log_ratio_to_reference(batch) * mask

    def _log_ratio_to_reference(self, batch: dict) -> Tensor:
        size = batch["completion_ids"].shape[1]
        policy = torch.cat([output.log_probs[:, -size:] for output in self._passes["policy"]])
        return policy - batch["ref_per_token_logps"]

    @staticmethod
    def _loss_mask(batch: dict) -> Tensor:
        return batch["completion_mask"] * batch.get("tool_mask", 1)

    def _moments(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation over what counts in all processes."""
        values = values[mask].double()
        local = torch.stack([values.sum(), values.square().sum(), mask.sum().double()])
        total, squares, count = self.accelerator.reduce(local, reduction="sum")
        mean = total / count.clamp(min=1)
        return mean.float(), (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt().float()

    def _log_values(self, values, returns, states, advantages, mask, mode: str) -> None:
        metrics = self._metrics[mode]
        mean, deviation = self._moments(advantages, mask)
        metrics["advantage/mean"].append(mean.item())
        metrics["advantage/std"].append(deviation.item())
        metrics["value/mean"].append(self._moments(values, states)[0].item())
        mean, deviation = self._moments(returns, states)
        metrics["return/mean"].append(mean.item())
        residual = self._moments(returns - values, states)[1]
        explained = 1 - (residual / deviation).square() if deviation > 1e-6 else torch.tensor(torch.nan)
        metrics["value/explained_variance"].append(explained.item())
        self._tokens += self.accelerator.reduce(mask.sum(), reduction="sum").item() if mode == "train" else 0

    def _watch_rewards(self) -> None:
        rewards = self._rewards
        alike = bool((rewards == rewards[0]).all())
        self._silent_rollouts = self._silent_rollouts + 1 if alike else 0
        if alike and self._silent_rollouts % SILENT_ROLLOUTS == 0:
            logger.warning(
                "All completions of the last %d rollouts got the same reward, %g: there is nothing to learn from. Do "
                "completions end before max_completion_length, and does the reward function find their answers?",
                self._silent_rollouts,
                rewards[0].item(),
            )

    def _adapt_beta(self, batch: dict, mode: str) -> None:
        """Ziegler et al. 2019 (arXiv 1909.08593), section 2.2, with the divergence per token."""
        if self.args.kl_in == "reward" or self.args.kl_target is not None:
            kl = self._moments(self._log_ratio_to_reference(batch), self._loss_mask(batch).bool())[0].item()
            if self.args.kl_in == "reward":
                self._metrics[mode]["kl"].append(kl)
            if self.args.kl_target is not None and mode == "train":
                error = min(max(kl / self.args.kl_target - 1, -0.2), 0.2)
                # A rollout that is longer than the horizon would turn it to 0, or below.
                self.beta *= 1 + error * min(1, len(self._rewards) / self.args.kl_horizon)
        if self.beta:
            self._metrics[mode]["beta"].append(self.beta)

    # Update

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        self._features = inputs.get("value_features")
        if self._replay is not None:
            self._replay.replay(inputs["router_choices"])
        beta = self.beta
        if self.args.kl_in == "reward":
            self.beta = 0.0
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta, self._features = beta, None
        (output,) = self._passes["policy"]
        return loss + self.args.value_loss_coef * self._value_loss(output.state_values, inputs, mode)

    def training_step(self, *args, **kwargs):
        """TRL's step; routers choose for themselves again only after it, since its backward pass may ask them, too."""
        loss = super().training_step(*args, **kwargs)
        if self._replay is not None:
            self._replay.stop()
        return loss

    def prediction_step(self, *args, **kwargs):
        """TRL's step of an evaluation."""
        result = super().prediction_step(*args, **kwargs)
        if self._replay is not None:
            self._replay.stop()
        return result

    def _value_loss(self, values: Tensor, inputs: dict, mode: str) -> Tensor:
        """Half the squared error, as in PPO2 no smaller than that of a value which has moved too far."""
        states, returns, old = inputs["value_mask"], inputs["returns"], inputs["state_values"]
        squares, clipped = (values - returns).square(), torch.zeros_like(states)
        if self.args.value_clip_range is not None:
            bounded = old + (values - old).clamp(-self.args.value_clip_range, self.args.value_clip_range)
            clipped = (bounded - returns).square() > squares
            squares = torch.maximum(squares, (bounded - returns).square())
        # As TRL's default loss: over the values of all processes and accumulated batches.
        count = inputs["num_values_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if mode == "train":
            count = count * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        self._metrics[mode]["value/clip_fraction"].append(self._moments(clipped.float(), states)[0].item())
        self._metrics[mode]["value/loss"].append(0.5 * self._moments(squares.detach(), states)[0].item())
        return 0.5 * (squares * states).sum() / count

    def create_optimizer(self, model=None):
        """TRL's optimizer, in which the value head has a group and a learning rate of its own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            named = (self.model if model is None else model).named_parameters()
            head = [parameter for name, parameter in named if PREFIX in name]
            of_head = set(map(id, head))
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_head]
            optimizer.add_param_group({"params": head, "lr": self.args.value_learning_rate, "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds how often routers agreed, and the speed."""
        if self.model.training:
            agreement = None if self._replay is None else self._replay.agreement()
            if agreement is not None:
                self._metrics["train"]["router_agreement"].append(agreement)
            seconds = time.perf_counter() - self._counting_since
            if self._tokens:
                self._metrics["train"]["tokens_per_second"].append(self._tokens / seconds)
            self._tokens, self._counting_since = 0.0, time.perf_counter()
        super().log(logs, start_time)

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        state_dict = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        policy, head = split_value_head(state_dict)
        super()._save(output_dir, policy)
        if self.args.should_save:
            save_value_head(head, output_dir or self.args.output_dir)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the card of the policy to `output_dir`, from the run's own figures and `card_facts`."""
        if self.is_world_process_zero():
            facts = {"train_file": "its training data", "prompt": "Question:", "num_problems": len(self.train_dataset)}
            model = self.accelerator.unwrap_model(self.model)
            record = ppo_record(model, self.args, self.state, facts | self.card_facts)
            write_card(self, record, CURVES, partial(card_of_ppo_policy, record))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with self._critic_from(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._critic_from(self.state.best_model_checkpoint):
            super()._load_best_model()

    @contextlib.contextmanager
    def _critic_from(self, checkpoint: str) -> Iterator[None]:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # They have the critic among all other weights.
            yield
            return
        with _without_value_head(self._policy):
            yield
        load_value_head(self._policy.value_head, checkpoint)


class _RecordedCall:
    """Calls a model with further arguments, and keeps what it returns."""

    def __init__(self, model: nn.Module, **options):
        self.model, self.options, self.outputs = model, options, []

    def __call__(self, **inputs):
        self.outputs.append(self.model(**inputs, **self.options))
        return self.outputs[-1]


@contextlib.contextmanager
def _without_value_head(policy: nn.Module) -> Iterator[None]:
    head = policy._modules.pop("value_head")
    try:
        yield
    finally:
        policy._modules["value_head"] = head

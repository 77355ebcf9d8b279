"""A critic on the policy's own backbone: one forward pass gives log-probabilities, entropies and values.

Shapes: batch; seq, prompt and completion; completion, the positions of a completion; states, completion + 1: before
each token of the completion and after its last one; hidden, the policy's width.
"""

import functools
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

VALUE_HEAD = "value_head.safetensors"
PREFIX = "value_head."


class ValueHead(nn.Module):
    """
    Value of a state from the policy's last hidden state there, `Linear, Tanh, Linear`; 0 for all states at first.

    Args:
        hidden_size (`int`): The policy's width.
        device, dtype: Of the weights.
    """

    def __init__(self, hidden_size: int, device=None, dtype=None):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_size, 1, device=device, dtype=dtype)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Values `(batch, states)` in float32 of features `(batch, states, hidden)`."""
        features = features.to(self.output.weight.dtype)
        return self.output(torch.tanh(self.hidden(features))).squeeze(-1).float()


@dataclass
class PolicyValueOutput(FusedCausalLMOutput):
    """
    TRL's scores of a completion, and beside them the critic's.

    Args:
        state_values (`torch.Tensor` of shape `(batch, states)`): Values of the states, where there is a critic.
        features (`torch.Tensor` of shape `(batch, states, hidden)`, *optional*): The states, without gradient.
    """

    state_values: Tensor | None = None
    features: Tensor | None = None


def add_value_head(model: PreTrainedModel, with_critic: bool = True, backbone_gradient: bool = False) -> None:
    """
    Gives a model with TRL's fused head a value head, and scores nothing but completions.

    `model(..., fused_lm_head=True, num_states=n)` then returns a [`PolicyValueOutput`]; any other call is as before,
    so that generation is. Values leave through the output, because DDP follows nothing else.

    Args:
        model (`PreTrainedModel`): Causal language model, after TRL's `add_fused_lm_head`; PEFT may be around it.
        with_critic (`bool`, *optional*, defaults to `True`): Whether to add the head, or only to give features.
        backbone_gradient (`bool`, *optional*, defaults to `False`): Whether the value loss reaches the backbone.
    """
    if with_critic:
        weight = model.get_output_embeddings().weight
        # In half precision the steps of a small learning rate round to nothing.
        model.value_head = ValueHead(model.config.get_text_config().hidden_size, weight.device, torch.float32)
    inner = model.forward

    @functools.wraps(inner)
    def forward(self, *args, num_states=None, value_features=None, return_features=False, **kwargs):
        if not kwargs.get("fused_lm_head"):
            return inner(*args, **kwargs)
        states = []

        def keep_completion(_module, _args, output):
            # Whatever the head does with the prompt's positions would be thrown away, and they are the most.
            output.last_hidden_state = output.last_hidden_state[:, -num_states:]
            states.append(output.last_hidden_state)
            return output

        handle = self.base_model.register_forward_hook(keep_completion)
        try:
            kwargs["labels"] = kwargs["labels"][:, -num_states:]
            scores = inner(*args, **kwargs)
        finally:
            handle.remove()
        features = states[0] if value_features is None else value_features
        values = None
        if with_critic:
            values = self.value_head(features if backbone_gradient else features.detach())
        return PolicyValueOutput(
            **scores, state_values=values, features=states[0].detach() if return_features else None
        )

    model.forward = types.MethodType(forward, model)


def split_value_head(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict without the value head's entries, and those by their names in the head."""
    head = {name.rpartition(PREFIX)[2]: value for name, value in state_dict.items() if PREFIX in name}
    return {name: value for name, value in state_dict.items() if PREFIX not in name}, head


def save_value_head(head: dict[str, Tensor], folder: str | Path) -> None:
    """Saves the entries of a value head as `value_head.safetensors`."""
    save_file({name: value.contiguous() for name, value in head.items()}, Path(folder, VALUE_HEAD))


def value_head_file(folder: str | Path) -> Path:
    """The file in a checkpoint of [`PPOTrainer`]; raises `FileNotFoundError` if there is none."""
    path = Path(folder, VALUE_HEAD)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {VALUE_HEAD}: it is no checkpoint of PPOTrainer.")
    return path


def load_value_head(head: ValueHead, folder: str | Path) -> None:
    """
    Loads what [`save_value_head`] saved.

    Raises:
        FileNotFoundError: If the folder has no value head.
        ValueError: If it is of another width.
    """
    path = value_head_file(folder)
    saved = load_file(path)
    width, expected = saved["output.weight"].shape[-1], head.output.in_features
    if width != expected:
        raise ValueError(f"{path} is of a policy of width {width}; this one has {expected}.")
    head.load_state_dict(saved)

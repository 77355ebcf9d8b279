"""MoRE: a decoder-only language model whose experts are feed-forward or recurrent.

Shapes: batch, seq, hidden, vocab; tokens = batch * seq, slots = experts per token, experts.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_more import MoreConfig
from .linear_cross_entropy import linear_cross_entropy

# transformers lets users choose an experts implementation only if this file has the text
# `@use_experts_implementation`, which decorates `MoreExperts` in the file of the experts.
from .more_experts import EXPERT_CLASSES, ExpertContext, MoreExperts
from .recurrence import RecurrenceOptions, sample_num_recurrences
from .routing import TopKRouter, balancing_loss, z_loss


@dataclass
class MoreModelOutputWithPast(MoeModelOutputWithPast):
    """Output of [`MoreModel`]; each routing field has one entry per layer.

    Args:
        router_weights (`tuple(torch.FloatTensor)`, *optional*): Weights of the experts, `(tokens, slots)`.
        router_indices (`tuple(torch.LongTensor)`, *optional*): Experts of each token, `(tokens, slots)`.
        recurrence_steps (`tuple(torch.LongTensor)`, *optional*): Steps that they took, `(tokens, slots)`; empty for
            experts that do not iterate, and for those that are split over processes.
    """

    router_weights: tuple[torch.FloatTensor, ...] | None = None
    router_indices: tuple[torch.LongTensor, ...] | None = None
    recurrence_steps: tuple[torch.LongTensor, ...] | None = None


@dataclass
class MoreCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Output of [`MoreForCausalLM`].

    Args:
        loss (`torch.FloatTensor`, *optional*):
            In training the language-modelling loss plus the weighted auxiliary losses; in evaluation the former alone.
        lm_loss (`torch.FloatTensor`, *optional*): The language-modelling loss alone.
        aux_loss (`torch.FloatTensor`, *optional*): The balancing loss, averaged over layers, not yet weighted.
        z_loss (`torch.FloatTensor`, *optional*): The router z-loss, averaged over layers, not yet weighted.
        router_weights, router_indices, recurrence_steps: As in [`MoreModelOutputWithPast`].
    """

    lm_loss: torch.FloatTensor | None = None
    z_loss: torch.FloatTensor | None = None
    router_weights: tuple[torch.FloatTensor, ...] | None = None
    router_indices: tuple[torch.LongTensor, ...] | None = None
    recurrence_steps: tuple[torch.LongTensor, ...] | None = None


class MoreSparseMoeBlock(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: MoreConfig, layer_idx: int):
        super().__init__()
        self.gate = TopKRouter(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            config.router_score_function,
            config.norm_topk_prob,
            config.router_balancing == "bias",
        )
        self.experts = EXPERT_CLASSES[config.expert_type](config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, context: ExpertContext) -> torch.Tensor:
        """Sends `hidden_states` of shape `(batch, seq, hidden)` through their experts."""
        tokens = hidden_states.flatten(0, 1)
        _, weights, indices = self.gate(tokens, (context.sequence_ids >= 0).flatten())
        output, _ = self.experts(tokens, indices, weights, context)
        return output.view_as(hidden_states)


class MoreDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention, then a mixture of experts."""

    def __init__(self, config: MoreConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = MoreSparseMoeBlock(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, context: ExpertContext, **kwargs) -> torch.Tensor:
        """Transforms `hidden_states` of shape `(batch, seq, hidden)`; `kwargs` are those of the attention."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), context)


class MorePreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers has to know about MoRE models."""

    config: MoreConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoreDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "context"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # In bfloat16 the bias could not take the small steps that balance it.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(TopKRouter, index=0),
        "router_weights": OutputRecorder(TopKRouter, index=1),
        "router_indices": OutputRecorder(TopKRouter, index=2),
        "recurrence_steps": OutputRecorder(MoreExperts, index=1),
        "hidden_states": MoreDecoderLayer,
        "attentions": LlamaAttention,
    }

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """As in transformers; experts that attend are reached by `all_reduce`, also in training."""
        split = mesh_manager is not None and distributed_config.enable_expert_parallel
        if split and model.config.expert_type == "more_a":
            implementation = distributed_config.ep_implementation
            if implementation not in ("auto", "all_reduce"):
                raise ValueError(
                    f"ep_implementation={implementation!r} sends `more_a` experts tokens without the sequence that "
                    "they attend to; use 'all_reduce', with `ep_size` equal to `tp_size`."
                )
            distributed_config = replace(distributed_config, ep_implementation="all_reduce")
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        for module in model.modules():
            if isinstance(module, MoreExperts) and module._is_expert_parallel:
                module.keep_context()
        return model

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, and the same files for a model that FSDP2 has sharded."""
        sharded = type(self)
        if sharded.__name__.startswith("FSDP"):
            # `fully_shard` makes a class of its own in a file of torch, which would be saved as the model's code. Its
            # full state holds tied weights twice, in two tensors.
            original = next(base for base in sharded.__mro__ if base.__name__ == sharded.__name__.removeprefix("FSDP"))
            sharded.__name__, sharded.__module__ = original.__name__, original.__module__
        if kwargs.get("state_dict") is not None:
            tied = self.all_tied_weights_keys
            kwargs["state_dict"] = {name: value for name, value in kwargs["state_dict"].items() if name not in tied}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        """Draws the parameters that transformers does not know.

        | parameter | distribution |
        | --- | --- |
        | router, adapters, attention and feed-forward maps of experts | normal, `initializer_range` |
        | GRU matrices | uniform within 1 / sqrt(width of the state), as in `torch.nn.GRU` |
        | gates of `more_c` and `more_d` | zero: both sides weigh the same |
        | learned first state of `more_a` | normal, `state_noise_std` |
        | norms | one |
        | biases that balance the router | zero |
        """
        super()._init_weights(module)
        if isinstance(module, TopKRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
            for name in ("e_score_correction_bias", "tokens_per_expert"):
                if name in module._buffers:
                    init.zeros_(getattr(module, name))
        elif isinstance(module, MoreExperts):
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("gru_"):
                    bound = parameter.shape[-1] ** -0.5
                    init.uniform_(parameter, -bound, bound)
                elif name.endswith("_norm"):
                    init.ones_(parameter)
                elif name.endswith("_gate"):
                    init.zeros_(parameter)
                elif name == "initial_state":
                    init.normal_(parameter, std=self.config.state_noise_std)
                else:
                    init.normal_(parameter, std=self.config.initializer_range)


class MoreModel(MorePreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MoreConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MoreDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        num_recurrences: int | None = None,
        exit_threshold: float | None = None,
        **kwargs,
    ) -> MoreModelOutputWithPast:
        """Runs the decoder.

        Args:
            num_recurrences (`int`, *optional*):
                Steps of recurrent experts in this pass. If unset, `config.num_recurrences`, or in training a draw by
                `config.recurrence_sampling`.
            exit_threshold (`float`, *optional*): As `config.exit_threshold`, for this pass.
            output_router_logits, output_router_weights, output_router_indices, output_recurrence_steps (`bool`,
                *optional*): Whether the output has these fields.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        packed_ids = None
        # While a graph is traced nobody knows whether there are several documents: who wants a cache then gets one.
        if (
            position_ids is not None
            and attention_mask is None
            and past_key_values is None
            and not (use_cache and is_tracing(position_ids))
        ):
            packed_ids = find_packed_sequence_indices(position_ids)
        # With a cache, transformers' masks take all tokens of a row for one document.
        if use_cache and past_key_values is None and packed_ids is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        context = ExpertContext(
            options=self._recurrence_options(num_recurrences, exit_threshold),
            sequence_ids=_sequence_ids(inputs_embeds, attention_mask, packed_ids),
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            noisy=self.training,
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                context,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return MoreModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _recurrence_options(self, num_recurrences: int | None, exit_threshold: float | None) -> RecurrenceOptions:
        config = self.config
        if num_recurrences is None:
            sampling = config.recurrence_sampling if self.training and config.is_recurrent else "fixed"
            num_recurrences = sample_num_recurrences(
                sampling, config.num_recurrences, config.min_recurrences, config.max_recurrences
            )
        if num_recurrences < 1:
            raise ValueError(f"`num_recurrences` is {num_recurrences}; a recurrent expert takes at least 1 step.")
        return RecurrenceOptions(
            num_recurrences=num_recurrences,
            backprop_recurrences=config.backprop_recurrences if self.training else None,
            exit_threshold=config.exit_threshold if exit_threshold is None else exit_threshold,
            min_recurrences=config.min_recurrences,
        )


def _sequence_ids(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, packed_ids: torch.Tensor | None
) -> torch.Tensor:
    """Number of the document of each token within its row, `(batch, seq)`; -1 for padding."""
    batch, seq = inputs_embeds.shape[:2]
    if packed_ids is not None:
        return packed_ids.expand(batch, seq)
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.zeros(batch, seq, dtype=torch.long, device=inputs_embeds.device)
    return attention_mask[:, -seq:].bool().long() - 1


class MoreForCausalLM(MorePreTrainedModel, GenerationMixin):
    r"""
    The decoder with a language-modelling head.

    Example:

    ```python
    >>> import torch
    >>> from mixturekit.modeling import MoreConfig, MoreForCausalLM

    >>> model = MoreForCausalLM(MoreConfig.from_preset("debug", expert_type="more_c"))
    >>> prompt = torch.tensor([[1, 2, 3]])
    >>> model.generate(prompt, max_new_tokens=4, num_recurrences=8).shape
    torch.Size([1, 7])
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MoreConfig):
        super().__init__(config)
        self.model = MoreModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def update_router_bias(self):
        """Lets `bias` balancing take its step; call it once per optimizer step. Does nothing for other balancing."""
        for module in self.modules():
            if isinstance(module, TopKRouter) and module.bias_balancing:
                module.update_bias(self.config.router_bias_update_rate)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        num_recurrences: int | None = None,
        exit_threshold: float | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoreCausalLMOutputWithPast:
        """Predicts the next token.

        Args:
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Tokens to predict; -100 is not counted.
            num_recurrences (`int`, *optional*), exit_threshold (`float`, *optional*): As in [`MoreModel`].
            return_logits (`bool`, *optional*):
                Whether the output has logits. By default they are left out in training with labels, where the loss is
                computed in chunks of `config.loss_chunk_size` tokens.
            num_items_in_batch (`int`, *optional*):
                Labels of the whole, perhaps accumulated, batch; every loss is divided by it, so that it is the same
                however the batch is split.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        with_losses = wanted or (labels is not None and self.training and self._has_router_losses)
        with_indices = kwargs.pop("output_router_indices", False) or wanted
        loss_kwargs = {name: kwargs.pop(name, None) for name in ("num_items_in_batch", "shift_labels")}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_recurrences=num_recurrences,
            exit_threshold=exit_threshold,
            output_router_logits=with_losses,
            output_router_indices=with_losses or with_indices,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        # A head that is split over processes has to be called, because it gathers its logits then.
        whole = type(self.lm_head) is nn.Linear and not isinstance(self.lm_head.weight, DTensor)
        chunked = self.config.loss_chunk_size > 0 and whole
        if return_logits is None:
            return_logits = labels is None or not (self.training and chunked)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept]) if return_logits else None
        lm_loss = loss = aux_loss = router_z_loss = None
        targets, total = _shifted_targets(labels, **loss_kwargs)
        if targets is not None:
            lm_loss = loss = self._language_modelling_loss(hidden_states, logits, targets, chunked) / total
        if with_losses:
            mask = _sequence_ids(hidden_states, attention_mask, None) >= 0
            aux_loss, router_z_loss = self._router_losses(outputs, mask, targets, total)
            if loss is not None and self.training:
                loss = loss + self.config.router_z_loss_coef * router_z_loss.to(loss.device)
                if self.config.router_balancing == "auxiliary_loss":
                    loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoreCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if wanted else None,
            # A copy, because `Trainer` scales the loss in place.
            lm_loss=None if lm_loss is None else lm_loss.detach().clone(),
            z_loss=router_z_loss,
            router_weights=outputs.router_weights,
            router_indices=outputs.router_indices if with_indices else None,
            recurrence_steps=outputs.recurrence_steps,
        )

    @property
    def _has_router_losses(self) -> bool:
        balanced = self.config.router_balancing == "auxiliary_loss" and self.config.router_aux_loss_coef > 0
        return balanced or self.config.router_z_loss_coef > 0

    def _language_modelling_loss(self, hidden_states, logits, targets, chunked):
        if logits is None or logits.shape[:2] != targets.shape:
            if chunked:
                return linear_cross_entropy(
                    hidden_states.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.loss_chunk_size
                )
            logits = self.lm_head(hidden_states)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    def _router_losses(self, outputs, mask, targets, total):
        """Balancing loss and z-loss, averaged over layers and over sequences by their share of the labels."""
        if targets is None:
            share = mask.float().sum(dim=1) / mask.sum()
        else:
            share = (targets != -100).float().sum(dim=1) / total
        layers = list(zip(outputs.router_logits, outputs.router_indices, strict=True))
        balancing = z = 0.0
        for logits, indices in layers:
            on_device = mask.to(logits.device)
            balancing = balancing + balancing_loss(logits, indices, on_device, self.config.router_score_function)
            z = z + z_loss(logits, on_device)
        share = share.to(balancing.device)
        return (balancing * share).sum() / len(layers), (z * share).sum() / len(layers)


def _shifted_targets(labels, num_items_in_batch=None, shift_labels=None):
    """The token that each position predicts, `(batch, seq)`, and the number by which losses are divided."""
    if labels is None and shift_labels is None:
        return None, None
    targets = shift_labels
    if targets is None:
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if num_items_in_batch is not None:
        return targets, num_items_in_batch
    return targets, (targets != -100).sum().clamp(min=1)


__all__ = [
    "MoreCausalLMOutputWithPast",
    "MoreForCausalLM",
    "MoreModel",
    "MoreModelOutputWithPast",
    "MorePreTrainedModel",
]

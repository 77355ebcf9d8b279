import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mixturekit.modeling.routing_statistics import (
    Routing,
    RoutingRecorder,
    dead_experts,
    expert_counts,
    expert_load,
    find_recorded,
    infer_scores,
    layer_numbers,
    load_balance_cv,
    mean_recurrence_steps,
    router_entropy,
    router_probabilities,
    token_entropies,
)

TINY = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4))


def olmoe():
    return OlmoeForCausalLM(OlmoeConfig(**TINY, num_experts=4))


def qwen3_moe():
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, num_experts=4, moe_intermediate_size=16, head_dim=8))


def phimoe():
    return PhimoeForCausalLM(PhimoeConfig(**TINY, num_local_experts=4))


def deepseek_v3():
    config = DeepseekV3Config(
        **TINY | {"num_hidden_layers": 3},
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return DeepseekV3ForCausalLM(config)


def dbrx():
    config = DbrxConfig(
        d_model=16,
        n_heads=2,
        n_layers=2,
        vocab_size=32,
        max_seq_len=32,
        pad_token_id=0,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"hidden_size": 16, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    )
    config.num_experts_per_tok = 2
    return DbrxForCausalLM(config)


ARCHITECTURES = [mixtral, olmoe, qwen3_moe, phimoe, deepseek_v3, dbrx]


def spread_routers(model, seed=0):
    """Initial routers hardly tell experts apart: make them."""
    generator = torch.Generator().manual_seed(seed)
    for router, _ in find_recorded(model, "router_logits").values():
        for parameter in router.parameters():
            parameter.data.normal_(0, 1, generator=generator)
    return model


def batch():
    """Three rows of 6, 4 and 1 tokens, padded on the right, on the left and on both sides."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]])
    input_ids = torch.randint(3, 32, (3, 6), generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": input_ids, "attention_mask": mask}


def record(model, inputs, **kwargs):
    routings = {}
    with RoutingRecorder(model, lambda layer, routing: routings.setdefault(layer, []).append(routing), **kwargs):
        model(**inputs)
    return routings


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_counts_exclude_padding():
    indices = torch.tensor([[0, 1], [1, 2], [3, 3]])
    assert expert_counts(indices, 5).tolist() == [1, 2, 1, 2, 0]
    counts = expert_counts(indices, 5, torch.tensor([True, True, False]))
    assert counts.tolist() == [1, 2, 1, 0, 0]
    assert expert_load(counts).tolist() == [0.25, 0.5, 0.25, 0, 0]
    assert dead_experts(counts).item() == 2


@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 5, 5, 5], 0.0), ([20, 0, 0, 0], math.sqrt(3)), ([3, 1], 0.5), ([0, 0], 0.0)]
)
def test_load_balance_cv_is_population_std_over_mean(counts, expected):
    assert load_balance_cv(torch.tensor(counts)).item() == pytest.approx(expected)


def test_entropy_extremes_and_padding():
    uniform, certain = torch.zeros(1, 8), torch.tensor([[1e4] + [-1e4] * 7])
    assert router_entropy(uniform).item() == pytest.approx(math.log(8))
    assert router_entropy(certain).item() == 0
    logits = torch.cat([uniform, certain, torch.full((1, 8), torch.nan)])
    assert router_entropy(logits, torch.tensor([True, True, False])).item() == pytest.approx(math.log(8) / 2)
    assert router_entropy(logits, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_sigmoid_scores_are_normalised():
    logits = torch.randn(5, 6, dtype=torch.float64)
    expected = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    torch.testing.assert_close(router_probabilities(logits, "sigmoid"), expected.float())
    entropy = -(expected * expected.log()).sum(-1)
    torch.testing.assert_close(token_entropies(logits, "sigmoid"), entropy.float())
    assert router_probabilities(torch.full((1, 4), -1e3), "sigmoid").tolist() == [[0.25] * 4]
    with pytest.raises(ValueError, match="softmax, sigmoid, probabilities, not 'relu'"):
        router_probabilities(logits, "relu")


def test_mean_recurrence_steps():
    steps = torch.tensor([[2, 4], [1, 1], [9, 9]])
    assert mean_recurrence_steps(steps, torch.tensor([True, True, False])).item() == 2


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_told_from_the_weights(top_k, normalise, scores, dtype):
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    activations = logits.sigmoid() if scores == "sigmoid" else logits.softmax(-1)
    weights, indices = activations.topk(top_k, dim=-1)
    if normalise:
        weights = 2.5 * weights / weights.sum(-1, keepdim=True)
    recorded = logits.softmax(-1) if scores == "probabilities" else logits
    answer = infer_scores(Routing(recorded, weights.to(dtype), indices, None))
    # The weights of a renormalised top-1 say nothing.
    assert answer == ("softmax" if scores == "sigmoid" and top_k == 1 and normalise else scores)


def test_layer_numbers():
    assert layer_numbers(["model.layers.1.mlp.gate", "model.layers.3.mlp.experts.0"]) == [1, 3]
    assert layer_numbers(["encoder.block.1.gate", "decoder.block.1.gate"]) == [0, 1]
    assert layer_numbers(["gate"]) == [-1] and layer_numbers([]) == []


@pytest.mark.parametrize("build", ARCHITECTURES)
def test_recorder_agrees_with_the_models_own_router_logits(build):
    model = spread_routers(build()).eval()
    inputs = batch()
    with torch.no_grad():
        routings = record(model, inputs)
        expected = model.base_model(**inputs, output_router_logits=True).router_logits
    assert list(routings) == ([1, 2] if build is deepseek_v3 else [0, 1])
    for (routing,), logits in zip(routings.values(), expected, strict=True):
        torch.testing.assert_close(routing.logits, logits.flatten(0, -2))
        assert routing.weights.shape == routing.indices.shape == (18, 2)
        assert routing.indices.dtype == torch.int64 and routing.indices.max() < 4
        assert torch.equal(routing.mask, inputs["attention_mask"].flatten().bool())
    scores = "sigmoid" if build is deepseek_v3 else "softmax"
    assert infer_scores(routings[1][0]) == scores


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputation_is_not_recorded(use_reentrant):
    model = mixtral().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    routings = {}
    calls = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: calls.append(1))
    with RoutingRecorder(model, lambda layer, routing: routings.setdefault(layer, []).append(routing)):
        embeds = model.get_input_embeddings()(batch()["input_ids"])
        model(inputs_embeds=embeds, labels=batch()["input_ids"]).loss.backward()
    assert len(calls) == 2, "nothing was recomputed, so this test shows nothing"
    assert [len(recorded) for recorded in routings.values()] == [1, 1]


def test_training_only_skips_evaluation_and_no_grad():
    model = mixtral()
    assert record(model.eval(), batch(), training_only=True) == {}
    with torch.no_grad():
        assert record(model.train(), batch(), training_only=True) == {}
    assert len(record(model, batch(), training_only=True)) == 2


def test_forward_that_raised_leaves_no_mask_to_the_next_one():
    model, recorded = mixtral(), []

    def fail(*_):
        raise RuntimeError("interrupted")

    with RoutingRecorder(model, lambda layer, routing: recorded.append(layer), training_only=True):
        handle = model.model.norm.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            model.train()(**batch())
        assert recorded == [0, 1]
        handle.remove()
        model.eval()(**batch())
        assert recorded == [0, 1]


def test_mask_with_a_cache_covers_the_new_tokens_only():
    model = mixtral().eval()
    inputs = batch()
    past = model(input_ids=inputs["input_ids"][:, :4], attention_mask=inputs["attention_mask"][:, :4])
    new = inputs | {"input_ids": inputs["input_ids"][:, 4:], "past_key_values": past.past_key_values}
    (routing,) = record(model, new)[0]
    assert torch.equal(routing.mask, inputs["attention_mask"][:, 4:].flatten().bool())
    # A positional mask, no mask, and a mask that is not one of padding.
    assert record(model, {"input_ids": inputs["input_ids"]})[0][0].mask is None
    four_dimensional = torch.zeros(3, 1, 6, 6)
    assert record(model, inputs | {"attention_mask": four_dimensional})[0][0].mask is None


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_removed(fails):
    model = mixtral()
    before = num_hooks(model)

    def on_routing(layer, routing):
        assert num_hooks(model) > before
        if fails:
            raise RuntimeError("boom")

    recorder = RoutingRecorder(model, on_routing)
    try:
        with recorder:
            model(**batch())
    except RuntimeError:
        assert fails
    assert num_hooks(model) == before


def test_recorder_works_through_wrappers():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **kwargs):
            return self.module(**kwargs)

    routings = record(Wrapper(mixtral()), batch())
    assert list(routings) == [0, 1]
    assert routings[0][0].mask.sum() == 11


class RecurrentExperts(nn.Module):
    def forward(self, hidden_states, indices, weights):
        return hidden_states, indices + 1


class RecurrentBlock(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        self.experts = RecurrentExperts()

    def forward(self, hidden_states):
        flat = hidden_states.flatten(0, 1)
        _, weights, indices = self.gate(flat)
        return self.experts(flat, indices, weights)[0].reshape(hidden_states.shape)


def test_recurrence_steps():
    model = mixtral().eval()
    declared = model._can_record_outputs | {
        "recurrence_steps": SimpleNamespace(target_class=RecurrentExperts, index=1, layer_name=None, class_name=None)
    }
    model._can_record_outputs = model.model._can_record_outputs = declared
    model.model.layers[1].mlp = RecurrentBlock(model.model.layers[1].mlp.gate)
    indices, steps = {}, {}
    with RoutingRecorder(
        model,
        lambda layer, routing: indices.update({layer: routing.indices}),
        lambda layer, recorded, mask: steps.update({layer: (recorded, mask)}),
    ):
        model(**batch())
    assert list(indices) == [0, 1] and list(steps) == [1]
    assert torch.equal(steps[1][0], indices[1] + 1) and steps[1][1].sum() == 11


def test_errors_are_clear():
    dense = {k: v for k, v in TINY.items() if k != "num_experts_per_tok"}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router: it is not a mixture of experts"):
        RoutingRecorder(LlamaForCausalLM(LlamaConfig(**dense)), print)
    model = dbrx()
    del model.config.num_experts_per_tok
    with pytest.raises(ValueError, match="set config.num_experts_per_tok"):
        record(model, batch())

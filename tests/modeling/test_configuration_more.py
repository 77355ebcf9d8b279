"""Presets are matched, what a configuration says of its model is what the model has, and bad values are named."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from mixturekit.modeling import MoreConfig, MoreForCausalLM, MoreModel
from mixturekit.modeling.configuration_more import EXPERT_TYPES, PRESETS

MILLIONS = {"tiny": 10, "small": 45, "medium": 160}
sizes = pytest.mark.parametrize("size", PRESETS)
expert_types = pytest.mark.parametrize("expert_type", EXPERT_TYPES)


def count_parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MoreForCausalLM(config).parameters())


@sizes
def test_variants_of_a_size_have_the_same_parameters(size):
    counts = [count_parameters(MoreConfig.from_preset(size, expert_type)) for expert_type in EXPERT_TYPES]
    assert max(counts) / min(counts) < 1.03
    if size in MILLIONS:
        assert sum(counts) / len(counts) / 1e6 == pytest.approx(MILLIONS[size], rel=0.06)


@sizes
def test_variants_of_a_size_have_the_same_operations(size):
    flops = [MoreConfig.from_preset(size, kind, match="flops").flops_per_token(256) for kind in EXPERT_TYPES]
    assert max(flops) / min(flops) < 1.05
    matched_by_parameters = [MoreConfig.from_preset(size, kind).flops_per_token(256) for kind in EXPERT_TYPES]
    assert max(matched_by_parameters) / min(matched_by_parameters) > 1.05


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_operations_are_matched_at_any_number_of_steps(steps):
    configs = [MoreConfig.from_preset("small", kind, match="flops", num_recurrences=steps) for kind in EXPERT_TYPES]
    flops = [config.flops_per_token(256) for config in configs]
    assert max(flops) / min(flops) < 1.05


def test_preset_keeps_what_is_given():
    config = MoreConfig.from_preset("tiny", "more_c", intermediate_size=100, num_hidden_layers=3)
    assert (config.intermediate_size, config.num_hidden_layers, config.hidden_size) == (100, 3, 128)
    assert MoreConfig.from_preset("tiny", "more_b", recurrent_size=32).recurrent_size == 32


@expert_types
@pytest.mark.parametrize(
    "options", [{}, {"state_initialization": "learned", "num_key_value_heads": 2, "head_dim": 24}]
)
def test_expert_parameters_are_those_of_the_model(expert_type, options):
    config = MoreConfig.from_preset("debug", expert_type, **options)
    experts = MoreModel(config).layers[0].mlp.experts
    assert config.expert_parameters() * config.num_experts == sum(p.numel() for p in experts.parameters())


def measured_flops_per_token(model, seq):
    """Multiply-accumulates of all products, times two, as torch dispatches them."""
    macs = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal macs
            output = func(*args, **(kwargs or {}))
            name = func.overloadpacket._qualified_op_name
            if name in ("aten::mm", "aten::_grouped_mm"):
                macs += args[0].shape[0] * args[0].shape[1] * output.shape[-1]
            elif "scaled_dot_product" in name:
                batch, heads, length, head_dim = args[0].shape
                # Half of the pairs, the causal ones: the query and key product, and the one with values.
                macs += 2 * batch * heads * head_dim * length * (length + 1) // 2
            else:
                assert not any(product in name for product in ("bmm", "addmm", "matmul", "linear", "fallback")), name
            return output

    with Counter(), torch.no_grad():
        model(torch.randint(3, 512, (2, seq)), use_cache=False)
    return 2 * macs / (2 * seq)


@expert_types
@pytest.mark.parametrize(
    "options", [{}, {"num_recurrences": 7, "num_key_value_heads": 2}, {"state_initialization": "learned"}]
)
def test_flops_per_token_are_those_of_the_model(expert_type, options):
    """Each token goes to all experts, so that the runs of `more_a` have a length that is known beforehand."""
    config = MoreConfig.from_preset("debug", expert_type, num_experts_per_tok=4, **options)
    measured = measured_flops_per_token(MoreForCausalLM(config).eval(), seq=64)
    assert config.flops_per_token(64) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("expert_type", ["base", "more_b", "more_c", "more_d"])
def test_flops_per_token_count_the_chosen_experts_only(expert_type):
    config = MoreConfig.from_preset("debug", expert_type, num_experts=8, num_experts_per_tok=2)
    measured = measured_flops_per_token(MoreForCausalLM(config).eval(), seq=64)
    assert config.flops_per_token(64) == pytest.approx(measured, rel=0.02)


def test_flops_of_other_numbers_of_steps():
    config = MoreConfig.from_preset("debug", "more_b", num_recurrences=4)
    per_step = 2 * config.num_hidden_layers * 4 * config.recurrent_size**2
    assert config.flops_per_token(64, num_recurrences=5) - config.flops_per_token(64) == per_step
    base = MoreConfig.from_preset("debug")
    assert base.flops_per_token(64, num_recurrences=5) == base.flops_per_token(64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_type": "more_e"}, "`expert_type` is 'more_e'; choose one of base, more_a"),
        ({"router_score_function": "relu"}, "`router_score_function` is 'relu'; choose one of softmax, sigmoid"),
        ({"router_balancing": "luck"}, "`router_balancing` is 'luck'; choose one of auxiliary_loss, bias, none"),
        ({"recurrence_sampling": "poisson"}, "`recurrence_sampling` is 'poisson'; choose one of fixed, uniform"),
        ({"state_initialization": "ones"}, "`state_initialization` is 'ones'; choose one of zeros, learned, noise"),
        ({"vocab_size": 0}, "`vocab_size` is 0; it must be at least 1"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0; it must be at least 1"),
        ({"intermediate_size": -8}, "`intermediate_size` is -8; it must be at least 1"),
        ({"recurrent_size": 0}, "`recurrent_size` is 0; it must be at least 1"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` is 0; it must be at least 1"),
        ({"hidden_size": 100}, r"`hidden_size` \(100\) is not a multiple of `num_attention_heads` \(8\); change one"),
        ({"num_key_value_heads": 3}, r"`num_attention_heads` \(8\) must be a multiple of `num_key_value_heads` \(3\)"),
        ({"head_dim": 0}, "`head_dim` is 0; it must be at least 1"),
        ({"num_experts_per_tok": 9}, r"`num_experts_per_tok` is 9; it must lie between 1 and `num_experts` \(8\)"),
        ({"num_experts_per_tok": 0}, "`num_experts_per_tok` is 0; it must lie between 1"),
        ({"num_experts": 0}, r"`num_experts_per_tok` is 1; it must lie between 1 and `num_experts` \(0\)"),
        ({"num_recurrences": 0}, "`num_recurrences` is 0; a recurrent expert takes at least 1 step"),
        ({"min_recurrences": 0}, "`min_recurrences` is 0; a recurrent expert takes at least 1 step"),
        ({"backprop_recurrences": 0}, "`backprop_recurrences` is 0; a recurrent expert takes at least 1 step"),
        ({"min_recurrences": 3, "max_recurrences": 2}, r"`max_recurrences` \(2\) is below `min_recurrences` \(3\)"),
        ({"exit_threshold": -0.1}, r"`exit_threshold` is -0.1; it must be 0 \(never exit\) or positive"),
        ({"loss_chunk_size": -1}, r"`loss_chunk_size` is -1; it must be 0 \(all logits at once\) or positive"),
    ],
    ids=str,
)
def test_bad_value_is_named_with_its_remedy(values, message):
    with pytest.raises(ValueError, match=message):
        MoreConfig(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "huge"}, "Unknown preset 'huge'; choose one of debug, tiny, small, medium"),
        ({"size": "tiny", "match": "time"}, "`match` is 'time'; choose one of parameters, flops"),
        (
            {"size": "tiny", "expert_type": "more_a", "match": "flops", "num_recurrences": 16},
            "With num_recurrences=16 even the narrowest 'more_a' expert costs more .*; lower `num_recurrences`",
        ),
        ({"size": "tiny", "expert_type": "moe"}, "`expert_type` is 'moe'; choose one of base"),
    ],
    ids=str,
)
def test_bad_preset_is_named_with_its_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoreConfig.from_preset(**arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": "eight"}, "Field 'num_experts' expected int, got str"),
        ({"head_dim": 31}, "even rotary dimension"),
    ],
    ids=str,
)
def test_transformers_checks_types_and_positions(values, message):
    with pytest.raises(StrictDataclassError, match=message):
        MoreConfig(**values)


@expert_types
def test_configuration_survives_saving(expert_type, tmp_path):
    config = MoreConfig.from_preset("tiny", expert_type, exit_threshold=0.25, backprop_recurrences=2)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoreConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_names_that_other_libraries_read():
    config = MoreConfig(num_experts=6)
    assert config.num_local_experts == 6
    assert math.isclose(config.router_aux_loss_coef, 0.01)
    assert not config.output_router_logits

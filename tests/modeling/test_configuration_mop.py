"""What a MoP configuration understands, what it refuses, and what it computes."""

import pytest

from mixturekit.modeling import MopConfig, MopForActionPrediction


def test_layers_as_lists_and_as_text_are_the_same():
    assert MopConfig(layers="0,16,32; 8").layers == MopConfig(layers=[[0, 16, 32], [8]]).layers == [[0, 16, 32], [8]]
    assert MopConfig(layers=["0,16", "8"]).layers == [[0, 16], [8]]
    assert MopConfig().layers == [[32, 64, 128], [64, 128, 256]]


@pytest.mark.parametrize("layers", ["32,x", "32,,64", "", "32;", "-4,8", [[]], [], [[1.5]], "1 6,3"])
def test_layers_that_do_not_parse(layers):
    with pytest.raises(ValueError, match="`layers` is"):
        MopConfig(layers=layers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "cnn"}, "'cnn'; choose one of flat, bow_conv_film, features"),
        ({"expert_norm": "rms"}, "'rms'; choose one of layernorm, batchnorm, none"),
        ({"encoder": "features"}, "`input_dim` must say"),
        ({"router_dim": 0}, "`router_dim` is 0"),
        ({"policy_type": "gru"}, "one expert of size 1 or more"),
        ({"recurrence": "published", "policy_type": "gru", "layers": "8;8"}, "needs `policy_type='pathways'`"),
        ({"recurrence": "published", "layers": "8,0;0,0"}, "size 1 or more in every layer, not .* and .*0, 0"),
        ({"mission_encoder": "pretrained"}, "name a text model"),
        ({"expert_dropout_max_prob": 1.5}, "1.5; it must lie between 0 and 1"),
        ({"cost_epsilon": 0.0}, "must be above 0"),
        ({"task_names": ["a", "b"]}, "2 names for 1 tasks"),
    ],
)
def test_values_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        MopConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layers": "0,16,32;8", "router_dim": 24},
        {"expert_norm": "none"},
        {"expert_norm": "batchnorm"},
        {"policy_type": "gru", "layers": "40;30"},
    ],
)
def test_block_parameters_are_those_of_the_model(fields):
    config = MopConfig(**fields)
    blocks = MopForActionPrediction(config).model.blocks
    assert config.block_parameters() == sum(parameter.numel() for parameter in blocks.parameters())


@pytest.mark.parametrize("recurrence", ["time", "published"])
def test_gru_baseline_has_the_same_parameter_count(recurrence):
    config = MopConfig(layers="0,16,32;0,16,32;8", intermediate_dim=64, recurrence=recurrence)
    baseline = config.matched_gru()
    assert MopConfig.from_dict(baseline.to_dict()).layers == baseline.layers
    assert baseline.policy_type == "gru" and len(baseline.layers) == len(config.layers)
    assert baseline.block_parameters() == pytest.approx(config.block_parameters(), rel=0.02)
    assert config.policy_type == "pathways"


def test_normalised_costs_reach_one_where_the_largest_experts_do_all():
    config = MopConfig(layers="0,16,32;8;4,2")
    assert sum(max(layer) for layer in config.expert_costs()) == pytest.approx(1)
    assert config.expert_costs()[0][1] / config.expert_costs()[0][2] == pytest.approx(1 / 4)
    raw = MopConfig(layers="0,16,32;8;4,2", normalize_routing_cost=False, expert_cost_exponent=1.0).expert_costs()
    # A layer of one expert leaves the router no choice, so it costs nothing.
    assert raw == [[0, 16, 32], [0], [4, 2]]

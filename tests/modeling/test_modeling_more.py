"""The fast ways to run a model agree with the plain ones, and every parameter learns."""

import pytest
import torch

from mixturekit.modeling import MoreForCausalLM

# What changes the recurrence in training, and for which experts.
TRAINING = [
    (("base", "more_a", "more_b", "more_c", "more_d"), "full gradient", {}),
    (("more_a", "more_b", "more_c", "more_d"), "truncated gradient", {"backprop_recurrences": 1}),
    (("more_a", "more_b", "more_c", "more_d"), "sampled steps", {"recurrence_sampling": "log_normal_poisson"}),
    (("more_a",), "noise", {"state_initialization": "noise"}),
    (("more_a",), "learned state", {"state_initialization": "learned"}),
    (("more_a",), "learned state, truncated", {"state_initialization": "learned", "backprop_recurrences": 2}),
]


@pytest.fixture(
    params=[
        pytest.param({"expert_type": kind, "num_experts_per_tok": top_k, **options}, id=f"{kind}-top{top_k}-{name}")
        for kinds, name, options in TRAINING
        for kind in kinds
        for top_k in (1, 2)
    ]
)
def training_variant(request):
    """Configuration of each kind of expert, with each way to train its recurrence."""
    return request.param


def train_step(model, ids, **kwargs):
    """Logits and gradients by name, after one seeded backward pass."""
    torch.manual_seed(1)
    model.train().zero_grad()
    output = model(ids, labels=ids, return_logits=True, use_cache=False, **kwargs)
    output.loss.backward()
    return output.logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


def test_grouped_equals_eager(training_variant, build_more, build_tokens):
    model, ids = build_more(**training_variant), build_tokens(3, 20)
    logits, gradients = train_step(model, ids)
    model.set_experts_implementation("eager")
    plain_logits, plain_gradients = train_step(model, ids)
    torch.testing.assert_close(logits, plain_logits, atol=1e-3, rtol=1e-4)
    assert_same_gradients(gradients, plain_gradients)


def test_grouped_equals_eager_with_early_exit(recurrent_variant, build_more, build_tokens, exit_threshold):
    model, ids = build_more(**recurrent_variant, num_recurrences=6), build_tokens(3, 20)
    everything, _ = train_step(model, ids)
    logits, gradients = train_step(model, ids, exit_threshold=exit_threshold)
    assert (logits - everything).abs().max() > 1e-2
    model.set_experts_implementation("eager")
    plain_logits, plain_gradients = train_step(model, ids, exit_threshold=exit_threshold)
    torch.testing.assert_close(logits, plain_logits, atol=1e-3, rtol=1e-4)
    assert_same_gradients(gradients, plain_gradients)


def test_every_public_implementation_knows_recurrent_experts(variant, build_more, build_tokens):
    """The stock functions behind these names would compute a feed-forward layer."""
    model, ids = build_more(**variant), build_tokens(2, 8)
    expected = model(ids).logits
    model.set_experts_implementation("batched_mm")
    torch.testing.assert_close(model(ids).logits, expected)


def test_every_parameter_of_every_expert_gets_a_gradient(training_variant, build_more, build_tokens):
    _, gradients = train_step(build_more(**training_variant), build_tokens(4, 32))
    for name, gradient in gradients.items():
        pieces = gradient if ".experts." in name else gradient.unsqueeze(0)
        assert (pieces.flatten(1).abs().amax(dim=1) > 0).all(), name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_recurrences": 1}, id="one_step"),
        pytest.param({"num_recurrences": 3, "exit_threshold": 1e9}, id="all_leave_after_the_first"),
    ],
)
def test_a_single_step_leaves_no_parameter_without_gradient(options, variant, build_more, build_tokens):
    """Data-parallel training stops at a parameter that has none, even if the first step has no use for it."""
    model = build_more(**variant, **options).train()
    ids = build_tokens(2, 16)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_gradient_checkpointing_changes_nothing(training_variant, build_more, build_tokens):
    model, ids = build_more(**training_variant), build_tokens(3, 20)
    logits, gradients = train_step(model, ids)
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    checkpointed_logits, checkpointed_gradients = train_step(model, ids)
    torch.testing.assert_close(checkpointed_logits, logits)
    assert_same_gradients(checkpointed_gradients, gradients)


def assert_near_float32(logits, gradients, expected_logits, expected_gradients):
    """Rounding to bfloat16 may send a few tokens to other experts; the rest stays near."""
    assert logits.isfinite().all()
    errors = (logits.float() - expected_logits).norm(dim=-1) / expected_logits.norm(dim=-1)
    assert errors.quantile(0.8) < 0.05
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    actual, expected = (
        torch.cat([g.flatten().float() for g in of.values()]) for of in (gradients, expected_gradients)
    )
    assert torch.cosine_similarity(actual, expected, dim=0) > 0.95


def fresh_model(variant, build_more):
    """A model with the weights of a fresh start, where rounding does not send tokens to other experts."""
    model = build_more(**variant)
    torch.manual_seed(2)
    return MoreForCausalLM(model.config)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_bfloat16(variant, build_more, build_tokens, implementation):
    model, ids = fresh_model(variant, build_more), build_tokens(3, 20)
    model.set_experts_implementation(implementation)
    expected = train_step(model, ids)
    logits, gradients = train_step(model.to(torch.bfloat16), ids)
    assert logits.dtype == torch.bfloat16
    assert_near_float32(logits, gradients, *expected)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_bfloat16_autocast(variant, build_more, build_tokens, implementation):
    model, ids = fresh_model(variant, build_more), build_tokens(3, 20)
    model.set_experts_implementation(implementation)
    expected = train_step(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, gradients = train_step(model, ids)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert_near_float32(logits, gradients, *expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_run_with_early_exit_and_cache(
    recurrent_variant, build_more, build_tokens, exit_threshold, dtype
):
    model = build_more(**recurrent_variant).to(dtype)
    kwargs = {"max_new_tokens": 3, "pad_token_id": 0, "exit_threshold": exit_threshold}
    output = model.generate(build_tokens(2, 8), output_logits=True, return_dict_in_generate=True, **kwargs)
    assert torch.stack(output.logits).isfinite().all()


def test_router_decides_in_float32(variant, build_more, build_tokens):
    model = build_more(**variant, router_balancing="bias").to(torch.bfloat16)
    output = model(build_tokens(2, 8), output_router_logits=True)
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)


def test_evaluation_is_deterministic_and_training_is_noisy(build_more, build_tokens):
    model, ids = build_more(expert_type="more_a", state_initialization="noise"), build_tokens(2, 12)

    def logits_of_seed(seed):
        torch.manual_seed(seed)
        return model(ids).logits

    assert torch.equal(logits_of_seed(0), logits_of_seed(1))
    model.train()
    assert torch.equal(logits_of_seed(0), logits_of_seed(0))
    assert (logits_of_seed(0) - logits_of_seed(1)).abs().max() > 1e-2


def test_steps_of_a_pass_equal_steps_of_the_configuration(recurrent_variant, build_more, build_tokens):
    model, ids = build_more(**recurrent_variant), build_tokens(2, 12)
    four, seven = model(ids).logits, model(ids, num_recurrences=7).logits
    assert (four - seven).abs().max() > 1e-2
    model.config.num_recurrences = 7
    assert torch.equal(model(ids).logits, seven)


def test_sampled_steps_vary_in_training_only(recurrent_variant, build_more, build_tokens):
    model = build_more(**recurrent_variant, recurrence_sampling="uniform", min_recurrences=2, max_recurrences=5)
    ids = build_tokens(2, 6)

    def steps():
        return {model(ids, output_recurrence_steps=True).recurrence_steps[0].max().item() for _ in range(20)}

    assert steps() == {4}
    model.train()
    assert steps() == {2, 3, 4, 5}


def test_zero_steps_are_refused(variant, build_more, build_tokens):
    with pytest.raises(ValueError, match="`num_recurrences` is 0; a recurrent expert takes at least 1 step"):
        build_more(**variant)(build_tokens(1, 4), num_recurrences=0)


def test_input_is_told_once(build_more, build_tokens):
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        build_more()()


def test_recorded_routing(variant, build_more, build_tokens):
    """One entry per layer: logits of all experts, and the weights and numbers of the chosen ones."""
    model = build_more(**variant)
    recorded = {f"output_router_{field}": True for field in ("logits", "weights", "indices")}
    output = model(build_tokens(2, 6), **recorded, output_recurrence_steps=True)
    for logits, weights, indices in zip(
        output.router_logits, output.router_weights, output.router_indices, strict=True
    ):
        chosen = logits.softmax(dim=-1).gather(1, indices)
        share = chosen.sum(dim=1, keepdim=True) if variant["num_experts_per_tok"] > 1 else 1
        torch.testing.assert_close(weights, chosen / share)
    assert len(output.router_logits) == 2
    if variant["expert_type"] != "base":
        assert [layer.shape for layer in output.recurrence_steps] == [weights.shape] * 2


def test_training_in_chunks_equals_all_logits_at_once(variant, build_more, build_tokens):
    """In training the logits are left out, and neither the loss nor its gradients tell."""
    model, ids = build_more(**variant, loss_chunk_size=7).train(), build_tokens(3, 20)
    labels = torch.where(torch.rand(ids.shape) < 0.3, -100, ids)
    _, expected = train_step(model, ids)
    whole = model(ids, labels=labels, return_logits=True)
    chunked = model(ids, labels=labels)
    assert chunked.logits is None
    assert whole.logits.shape == (3, 20, 512)
    torch.testing.assert_close(chunked.loss, whole.loss)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert_same_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def test_evaluation_loss_is_the_language_modelling_loss(variant, build_more, build_tokens):
    """However it is asked for."""
    model, ids = build_more(**variant), build_tokens(3, 20)
    output = model(ids, labels=ids, output_router_logits=True)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.aux_loss > 0
    shifted = torch.cat((ids[:, 1:], torch.full((3, 1), -100)), dim=1)
    others = [
        {"labels": ids},
        {"shift_labels": shifted},
        {"labels": ids, "return_logits": False},
        {"labels": ids, "logits_to_keep": 1},
    ]
    for arguments in others:
        torch.testing.assert_close(model(ids, **arguments).loss, expected)


def assert_compiled_equals_uncompiled(model, ids, **options):
    torch._dynamo.reset()
    logits, gradients = train_step(model, ids)
    compiled_logits, compiled_gradients = train_step(torch.compile(model, **options), ids)
    torch.testing.assert_close(compiled_logits, logits, atol=1e-3, rtol=1e-4)
    compiled_gradients = {name.removeprefix("_orig_mod."): grad for name, grad in compiled_gradients.items()}
    assert_same_gradients(compiled_gradients, gradients)


def test_compiling_in_one_graph(build_more, build_tokens):
    model = build_more(expert_type="more_c", num_experts_per_tok=2)
    assert_compiled_equals_uncompiled(model, build_tokens(2, 16), backend="aot_eager", fullgraph=True)


@torch.no_grad()
def test_compiled_model_gives_a_cache_whether_or_not_positions_are_told(build_more, build_tokens):
    """Only an uncompiled one sees that positions start again, as in packed documents, which a cache would mix up."""
    torch._dynamo.reset()
    model, ids, positions = build_more(expert_type="more_c"), build_tokens(2, 8), torch.arange(8).expand(2, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for arguments in ({}, {"position_ids": positions}):
        output, expected = compiled(ids, **arguments), model(ids, **arguments)
        assert output.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == 8
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("expert_type", ["base", "more_b", "more_c", "more_d"])
def test_compiling_in_one_graph_to_machine_code(build_more, build_tokens, expert_type):
    model = build_more(expert_type=expert_type, num_experts_per_tok=2)
    assert_compiled_equals_uncompiled(model, build_tokens(2, 16), fullgraph=True)


@pytest.mark.slow
def test_compiling_around_the_attention_of_more_a(build_more, build_tokens):
    """Its runs of rows have lengths that only the data tell, and which break the graph."""
    assert_compiled_equals_uncompiled(build_more(expert_type="more_a"), build_tokens(2, 16), backend="aot_eager")

"""Adapters and 4-bit weights on the experts of real, tiny models: they arrive, they train, and they leave no trace."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.utils import is_bitsandbytes_available

from mixturekit.modeling import MoreConfig
from mixturekit.trainers.expert_adapters import (
    bytes_by_part,
    expert_lora_config,
    fused_expert_parameters,
    load_causal_lm,
    memory_report,
    merged_adapters,
    quantize_experts,
    quantized_expert_names,
)

needs_bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}
FUSED = {"experts.gate_up_proj", "experts.down_proj"}
GRU = {"experts.gru_hidden", "experts.gru_input"}


def phimoe():
    return PhimoeConfig(**SIZES, num_local_experts=4, head_dim=16, attention_bias=True, lm_head_bias=True)


def qwen3_moe():
    return Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)


# Each configuration with the modules and parameters that LoRA should find.
MODELS = {
    "phimoe": (phimoe, ATTENTION, FUSED),
    "qwen3_moe": (qwen3_moe, ATTENTION, FUSED),
    "qwen2_moe": (
        lambda: Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32),
        ATTENTION | FEED_FORWARD,
        FUSED,
    ),
    "mixtral": (lambda: MixtralConfig(**SIZES, num_local_experts=4), ATTENTION, FUSED),
    "olmoe": (lambda: OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2), ATTENTION, FUSED),
    "more": (lambda: MoreConfig.from_preset("debug", "base", vocab_size=96), ATTENTION, FUSED),
    "more_a": (
        lambda: MoreConfig.from_preset("debug", "more_a", vocab_size=96),
        ATTENTION,
        FUSED | {"experts.adapter_state", "experts.adapter_input", "experts.qkv_proj", "experts.o_proj"},
    ),
    "more_b": (
        lambda: MoreConfig.from_preset("debug", "more_b", vocab_size=96),
        ATTENTION,
        {"experts.up_proj", "experts.down_proj"} | GRU,
    ),
    "more_c": (lambda: MoreConfig.from_preset("debug", "more_c", vocab_size=96), ATTENTION, FUSED | GRU),
    "more_d": (lambda: MoreConfig.from_preset("debug", "more_d", vocab_size=96), ATTENTION, FUSED | GRU),
    "llama": (lambda: LlamaConfig(**SIZES), ATTENTION | FEED_FORWARD, set()),
    "gpt2": (
        lambda: GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, eos_token_id=2),
        {"c_attn", "c_proj", "c_fc"},
        set(),
    ),
}


def build(name, dtype=torch.float32):
    """A random model whose weights are large enough for experts to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name][0]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.to(dtype).eval()


def adapted(model, scale=0.05, **options):
    """The model with adapters that do something."""
    model = get_peft_model(model, expert_lora_config(model, r=4, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return model.eval()


def tokens():
    return torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture(params=[name for name in MODELS if MODELS[name][2]])
def mixture(request):
    return request.param


def test_lora_finds_attention_and_experts(name):
    _, modules, parameters = MODELS[name]
    config = expert_lora_config(build(name))
    assert set(config.target_modules) == modules
    assert set(config.target_parameters or ()) == parameters
    assert (config.r, config.lora_alpha, config.task_type) == (16, 32, "CAUSAL_LM")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_adapter_gets_a_gradient_and_only_adapters_do(name):
    model = get_peft_model(build(name), expert_lora_config(build(name), r=4))
    model.train()
    # Of the two factors one begins at zero, so that the other has no gradient before the first step.
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in key)
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    reached = {key.split(".lora_")[0] for key, parameter in model.named_parameters() if parameter.requires_grad}
    experts = [key for key in reached if "experts" in key and "shared_expert" not in key]
    assert len(experts) == len(fused_expert_parameters(build(name)))


def test_a_fresh_adapter_changes_nothing_and_one_that_is_off_leaves_the_base_model_to_the_bit(name):
    base = logits(build(name))
    model = get_peft_model(build(name), expert_lora_config(build(name), r=4)).eval()
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    model = adapted(build(name))
    assert not torch.allclose(logits(model), base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_adapters_are_loaded_back_as_they_were_saved(mixture, tmp_path):
    model = adapted(build(mixture))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(mixture), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_adapters_compute_the_same_and_unmerge_to_the_bit(name, dtype):
    model = adapted(build(name, dtype))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    addresses = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    expected = logits(model)
    with merged_adapters(model):
        changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
        merged = logits(model)
    # A pair of factors for each weight that changed.
    assert len(changed) == sum("lora_A" in key for key in before)
    if dtype == torch.float32:
        torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    # The very tensors, which an optimizer or another process may hold.
    assert {key: tensor.data_ptr() for key, tensor in after.items()} == addresses
    assert torch.equal(logits(model), expected)


def test_subtracting_what_was_added_would_not_give_the_same_weights():
    model = adapted(build("phimoe", torch.bfloat16))
    before = {key: parameter.clone() for key, parameter in fused_expert_parameters(model).items()}
    model.merge_adapter()
    model.unmerge_adapter()
    after = fused_expert_parameters(model)
    assert any(not torch.equal(after[key], parameter) for key, parameter in before.items())


def test_weights_are_put_back_after_an_error_and_after_use_of_the_base_model():
    model = adapted(build("phimoe"))
    expected = logits(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="out of memory"), merged_adapters(model):
        raise RuntimeError("out of memory")
    # PEFT itself unmerges here, by subtraction.
    with merged_adapters(model), model.disable_adapter():
        logits(model)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    assert torch.equal(logits(model), expected)


def test_merging_leaves_alone_what_is_off_merged_already_or_not_there():
    model = adapted(build("qwen3_moe"))
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
        with merged_adapters(model):
            assert torch.equal(logits(model), base)
    model.merge_adapter()
    once = logits(model)
    with merged_adapters(model):
        assert torch.equal(logits(model), once)
    assert torch.equal(logits(model), once)
    plain = build("qwen3_moe")
    with merged_adapters(plain):
        assert torch.equal(logits(plain), base)
    torch.testing.assert_close(once, expected, rtol=1e-3, atol=1e-3)


def test_training_goes_on_after_generation_with_merged_adapters():
    def train(merge):
        model = adapted(build("phimoe"))
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
        for _ in range(2):
            if merge:
                with merged_adapters(model):
                    model.generate(input_ids=tokens(), max_new_tokens=2, do_sample=False)
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {key: parameter for key, parameter in model.named_parameters() if "lora_" in key}

    plain, interrupted = train(False), train(True)
    assert all(torch.equal(interrupted[key], parameter) for key, parameter in plain.items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("phimoe", {"target_modules": ["q_proj", "w1"]}, "has 'w1', which PhimoeForCausalLM does not: it has k_proj"),
        ("phimoe", {"target_modules": ["gate"]}, "the experts are in experts.down_proj, experts.gate_up_proj, for"),
        ("phimoe", {"target_modules": "router"}, "does more than a linear layer: give 'router.weight' to"),
        ("qwen3_moe", {"target_modules": ["gate_proj"]}, "target_modules has 'gate_proj', which Qwen3MoeForCausalLM"),
        ("llama", {"target_parameters": ["experts.down_proj"]}, "does not: it has no fused expert weights."),
        ("mixtral", {"target_parameters": ["experts.w1"]}, "it has experts.down_proj, experts.gate_up_proj."),
        ("mixtral", {"target_modules": [], "target_parameters": []}, "LoRA finds nothing to adapt in Mixtral"),
        ("olmoe", {"lora_dropout": 0.1}, "lora_dropout is 0.1: adapters of fused expert weights take none"),
    ],
)  # fmt: skip
def test_a_name_that_reaches_nothing_is_refused_in_one_sentence(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        expert_lora_config(build(name), **options)
    assert "\n" not in str(error.value)


def test_names_of_ones_own_are_kept():
    model = build("phimoe")
    config = expert_lora_config(
        model, r=2, lora_alpha=4, target_modules="q_proj", target_parameters=["router.weight"], lora_dropout=0.0
    )
    assert set(config.target_modules) == {"q_proj"} and set(config.target_parameters) == {"router.weight"}
    assert set(expert_lora_config(model, target_modules="all-linear").target_modules) == ATTENTION
    attention = expert_lora_config(model, target_parameters=[], lora_dropout=0.1)
    assert not attention.target_parameters and attention.lora_dropout == 0.1
    wrapped = get_peft_model(model, config)
    trained = [key for key, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all("q_proj" in key or "router" in key for key in trained)


def test_bytes_by_part_count_everything_once(name):
    model = build(name)
    sizes = bytes_by_part(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert sum(sizes.values()) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert ("experts" in sizes) == bool(MODELS[name][2]) == ("router" in sizes)
    fused = fused_expert_parameters(model).values()
    experts = sum(parameter.numel() * parameter.element_size() for parameter in fused)
    assert experts <= sizes.get("experts", 0) <= experts * 1.02
    assert sizes["attention"] > 0 and sizes["embeddings"] > 0
    assert "adapters" not in sizes and bytes_by_part(adapted(model))["adapters"] > 0
    total = f"{sum(bytes_by_part(model).values()) / 2**20:.2f} MiB"
    assert memory_report(model).startswith(f"Weights {total}: ") and ", attention 0." in memory_report(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of tiny models, made when they are asked for."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(name, torch.bfloat16).save_pretrained(made[name])
        return str(made[name])

    return folder


@needs_bitsandbytes
def test_4_bits_reach_the_experts_and_spare_router_head_and_embeddings(mixture, folders):
    plain = load_causal_lm(folders(mixture), torch.bfloat16)
    model = load_causal_lm(folders(mixture), torch.bfloat16, load_in_4bit=True)
    before, after = bytes_by_part(plain), bytes_by_part(model)
    # Four bits and a scale in 32 bits for each 64 weights, of 16 bits each.
    assert after["experts"] == pytest.approx(before["experts"] * (4 + 32 / 64) / 16, rel=0.05)
    assert after["attention"] < 0.5 * before["attention"]
    for part in ("router", "embeddings", "head"):
        assert after.get(part) == before.get(part)
    assert len(quantized_expert_names(model)) == len(fused_expert_parameters(plain))
    assert not fused_expert_parameters(model)
    with torch.no_grad():
        one, other = logits(plain).float(), logits(model).float()
    # Coarse weights, but those weights.
    assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.8


@needs_bitsandbytes
def test_a_model_in_4_bits_trains_its_attention_after_evaluation_and_generation(mixture, folders):
    base = load_causal_lm(folders(mixture), torch.bfloat16, load_in_4bit=True)
    packed = {key: tensor.clone() for key, tensor in base.state_dict().items() if tensor.dtype == torch.uint8}
    model = get_peft_model(base, expert_lora_config(base, r=4))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        model.eval()
        losses.append(model(input_ids=tokens(), labels=tokens()).loss.item())
        with merged_adapters(model):
            model.generate(input_ids=tokens(), max_new_tokens=2, do_sample=False)
        model.train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    state = model.get_base_model().state_dict()
    kept = {key.replace(".base_layer", ""): tensor for key, tensor in state.items() if tensor.dtype == torch.uint8}
    assert packed.keys() == kept.keys() and all(torch.equal(packed[key], kept[key]) for key in packed)


@needs_bitsandbytes
def test_what_does_not_train_in_4_bits_is_refused_in_one_sentence():
    model = build("phimoe")
    quantize_experts(model)
    assert not expert_lora_config(model).target_parameters
    with pytest.raises(ValueError, match="'experts.down_proj', which is in 4 bits, where LoRA cannot train it: load"):
        expert_lora_config(model, target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match="The experts have LoRA adapters, which cannot train on 4-bit weights"):
        quantize_experts(adapted(build("phimoe")))


@needs_bitsandbytes
def test_quantising_says_what_it_saves():
    model = build("phimoe")
    before = sum(bytes_by_part(model).values())
    assert quantize_experts(model) == before - sum(bytes_by_part(model).values()) > 0
    assert quantize_experts(copy.deepcopy(build("llama"))) == 0


def test_a_checkpoint_that_is_none_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded: ") as error:
        load_causal_lm(str(tmp_path))
    assert "\n" not in str(error.value)

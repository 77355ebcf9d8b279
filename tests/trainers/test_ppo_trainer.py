"""PPO on tiny models: identities of the algorithm, learning, resuming, and what it relies on in TRL."""

import inspect
import logging
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.trainers.durable_grpo_trainer import DurableGRPOTrainer
from mixturekit.trainers.expert_adapters import load_causal_lm
from mixturekit.trainers.ppo_config import PPOConfig
from mixturekit.trainers.ppo_trainer import SILENT_ROLLOUTS, PPOTrainer, _without_value_head

WORDS = ["<pad>", "<s>", "</s>", *"0123456789+= "]
ROWS = [{"prompt": f"{i % 10}+{i * 7 % 10}=", "answer": str(i % 10)} for i in range(64)]
TINY = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2}
BUILDERS = {
    "phimoe": lambda: PhimoeForCausalLM(PhimoeConfig(**TINY, **EXPERTS, num_local_experts=4, head_dim=8)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**TINY, **EXPERTS, num_experts=4, moe_intermediate_size=32, head_dim=8)
    ),
    "more": lambda: MoreForCausalLM(MoreConfig.from_preset("debug", "more_c", **TINY, **EXPERTS)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(experts=True):
    names = ["experts.gate_up_proj", "experts.down_proj"] if experts else None
    return LoraConfig(r=4, target_modules=ATTENTION, target_parameters=names)


def build(name="phimoe", seed=0):
    torch.manual_seed(seed)
    model = BUILDERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
        # Otherwise a model as small as this hardly prefers any token, and hardly learns to.
        model.get_output_embeddings().weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def repeats_first_digit(prompts, completions, answer, **kwargs):
    return [float(completion.startswith(digit)) for completion, digit in zip(completions, answer, strict=True)]


def adds_up(prompts, completions, **kwargs):
    """A reward that differs from completion to completion."""
    return [sum(map(ord, completion)) % 5 / 4 for completion in completions]


def says_seven(prompts, completions, **kwargs):
    """The share of a completion's characters that are sevens."""
    return [completion.count("7") / 4 for completion in completions]


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    def make(model="phimoe", trainer_class=PPOTrainer, reward=repeats_first_digit, experts=True, peft=True, **options):
        config_class = PPOConfig if trainer_class is PPOTrainer else GRPOConfig
        more = {name: options.pop(name) for name in ("value_head", "eval_dataset") if name in options}
        settings = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 8, "max_completion_length": 4,
            "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True,
            "bf16": False, "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
            "learning_rate": 3e-3, "lr_scheduler_type": "constant",
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = config_class(**{**settings, **options})
        model = build(model) if isinstance(model, str) else model
        if not peft:
            # TRL loads the reference from where the policy came from.
            model.save_pretrained(tmp_path / "base")
            model = str(tmp_path / "base")
        return trainer_class(
            model,
            reward,
            config,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            peft_config=lora(experts) if peft else None,
            **more,
        )

    return make


def rollout(trainer, rows=ROWS[:8], seed=0):
    torch.manual_seed(seed)
    trainer.model.train()
    return trainer._generate_and_score_completions([dict(row) for row in rows])


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("replay", ["off", "r2"])
def test_without_learning_nothing_diverges(make_trainer, replay):
    trainer = make_trainer(
        learning_rate=0.0, value_learning_rate=0.0, num_iterations=3, max_steps=6, router_replay=replay
    )
    trainer.train()
    assert max(map(abs, logged(trainer, "kl"))) < 1e-9
    assert not any(logged(trainer, "clip_ratio/region_mean"))
    assert not any(logged(trainer, "value/clip_fraction"))
    assert set(logged(trainer, "router_agreement")) <= {1.0}


def test_a_critic_that_knows_nothing_leaves_grpos_advantages(make_trainer):
    options = {"num_generations": 4, "scale_rewards": "none", "beta": 0.05}
    # Not Phi-MoE, whose routers sample in TRL's trainer.
    options["reward"] = adds_up
    ours = make_trainer("qwen3_moe", lam=1.0, normalize_advantages=False, **options)
    theirs = make_trainer("qwen3_moe", trainer_class=GRPOTrainer, **options)
    rows = [row for row in ROWS[:4] for _ in range(4)]
    ours, theirs = rollout(ours, rows), rollout(theirs, rows)
    assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    assert theirs["advantages"].abs().sum() > 0
    expected = theirs["advantages"][:, None] * ours["completion_mask"]
    torch.testing.assert_close(ours["advantages"], expected)


@pytest.mark.parametrize("peft", [True, False], ids=["adapters", "all weights"])
@pytest.mark.parametrize("features", ["policy", "ref"])
def test_the_update_begins_with_the_values_of_the_rollout(make_trainer, features, peft):
    trainer = make_trainer(critic_features=features, peft=peft, num_iterations=2)
    torch.nn.init.normal_(trainer._policy.value_head.output.weight)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            # A policy that has left its reference.
            if parameter.requires_grad and "value_head" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    batch = rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, batch)
    values = trainer._passes["policy"][0].state_values
    torch.testing.assert_close(values, batch["state_values"], atol=1e-5, rtol=1e-4)
    other = make_trainer(critic_features="policy" if features == "ref" else "ref", peft=peft, num_iterations=2)
    other.model.load_state_dict(trainer.model.state_dict())
    assert (rollout(other)["state_values"] - values).abs().max() > 1e-3


def test_completions_without_a_reward_teach_nothing(make_trainer):
    some = lambda completions, **kwargs: [None if index % 2 else 1.0 for index in range(len(completions))]  # noqa: E731
    batch = rollout(make_trainer(reward=some))
    assert not batch["value_mask"][1::2].any() and not batch["advantages"][1::2].any()
    assert batch["value_mask"][::2].any(dim=1).all()


def test_values_do_not_see_the_action(make_trainer):
    trainer = make_trainer()
    policy = trainer._policy
    torch.nn.init.normal_(policy.value_head.output.weight)
    ids = torch.randint(3, len(WORDS), (2, 9))
    changed = ids.clone()
    changed[:, 6] = 3 + (ids[:, 6] - 2) % (len(WORDS) - 3)

    def values(ids):
        labels = ids.clone()
        labels[:, :4] = -100
        return policy(ids, labels=labels, fused_lm_head=True, num_states=6).state_values

    before, after = values(ids), values(changed)
    # Of six states, the first is that before token 4, the last that after token 8.
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).all()


def test_scores_of_completions_alone_are_those_of_the_whole_forward(make_trainer):
    trainer = make_trainer()
    batch = rollout(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    size = batch["completion_ids"].shape[1]
    scored, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, size, compute_entropy=True
    )
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -size - 1 : -1].log_softmax(-1)
    expected = logits.gather(-1, batch["completion_ids"][..., None])[..., 0]
    kept = batch["completion_mask"].bool()
    torch.testing.assert_close(scored[kept], expected[kept])
    torch.testing.assert_close(entropies[kept], -(logits.exp() * logits).sum(-1)[kept])


def test_divergence_in_the_reward_is_paid_by_each_token(make_trainer):
    trainer = make_trainer(kl_in="reward", beta=0.5, lam=1.0, normalize_advantages=False)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    batch = rollout(trainer)
    mask = batch["completion_mask"].bool()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    size = batch["completion_ids"].shape[1]
    with torch.no_grad():
        policy, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, size)
    cost = 0.5 * (policy - batch["ref_per_token_logps"]) * mask
    assert cost.abs().sum() > 0.01
    scores = torch.tensor(
        repeats_first_digit(
            None,
            trainer._tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True),
            [row["answer"] for row in ROWS[:8]],
        )
    )
    expected = (scores[:, None] - cost.flip(1).cumsum(1).flip(1)) * mask
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("level", "state"), [("prompt", lambda batch: 0), ("sequence", lambda batch: batch["completion_mask"].sum(1))]
)
def test_coarser_critics_have_one_value_for_a_completion(make_trainer, level, state):
    trainer = make_trainer(critic_level=level, normalize_advantages=False)
    torch.nn.init.normal_(trainer._policy.value_head.output.weight)
    batch = rollout(trainer)
    places = torch.as_tensor(state(batch)).expand(8)
    assert torch.equal(batch["value_mask"].long().argmax(1), places) and batch["value_mask"].sum(1).eq(1).all()
    value = batch["state_values"].gather(1, places[:, None])
    expected = (trainer._rewards[:, None] - value) * batch["completion_mask"]
    torch.testing.assert_close(batch["advantages"], expected)


@pytest.mark.parametrize("model", BUILDERS)
@pytest.mark.parametrize("peft", [True, False])
def test_every_kind_of_model_learns(make_trainer, model, peft):
    experts = model in ("phimoe", "qwen3_moe")
    trainer = make_trainer(model, reward=adds_up, experts=experts, peft=peft, num_iterations=2, max_steps=4)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any("value_head" in name for name in moved)
    assert any("lora" in name if peft else "self_attn" in name for name in moved)
    assert not any(("router" in name or "mlp.gate." in name) and "lora" not in name for name in moved)
    assert peft is False or all("lora" in name or "value_head" in name for name in moved)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_generations": 4, "critic_features": "ref", "router_replay": "r2"},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "kl_in": "reward", "kl_target": 0.5},
    ],
    ids=["one", "group", "sequence"],
)
def test_rewards_rise(make_trainer, options):
    settings = {"beta": 0.01, "max_steps": 60, "num_iterations": 2, "value_learning_rate": 1e-2, "logging_steps": 10}
    trainer = make_trainer(reward=says_seven, learning_rate=1e-2, **settings, **options)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert rewards[-1] > rewards[0] + 0.3, rewards


def test_the_critic_comes_to_explain_returns(make_trainer):
    length = lambda completions, **kwargs: [len(completion) / 4 for completion in completions]  # noqa: E731
    trainer = make_trainer(
        reward=length, learning_rate=0.0, value_learning_rate=1e-2, max_steps=80, logging_steps=10, lam=1.0
    )
    trainer.train()
    explained = logged(trainer, "value/explained_variance")
    assert explained[-1] > 0.5 > explained[0]


@pytest.mark.parametrize("level", ["token", "prompt", "sequence"])
def test_tokens_of_tools_get_nothing_and_keep_nothing_from_others(make_trainer, level):
    trainer = make_trainer(critic_level=level, lam=1.0, normalize_advantages=False, reward=adds_up)
    torch.nn.init.normal_(trainer._policy.value_head.output.weight)
    batch = rollout(trainer)
    values = batch["state_values"]
    batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][:, 1] = batch["tool_mask"][:, 3] = 0
    result = trainer._advantages(batch, "train")
    chosen, score = batch["tool_mask"].bool(), trainer._rewards[:, None]
    assert chosen.shape[1] == 4 and score.unique().numel() > 1
    value = {"token": values[:, [0, 2]], "prompt": values[:, [0]], "sequence": values[:, [3]]}[level]
    assert not result["advantages"][:, [1, 3]].any()
    torch.testing.assert_close(result["advantages"][:, [0, 2]], (score - value).expand(-1, 2))


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


PPO = {"kl_target": 0.1, "router_replay": "r2"}


@pytest.mark.parametrize("stopped_at", [2, 3], ids=["between rollouts", "within a rollout"])
@pytest.mark.parametrize(
    ("trainer_class", "options"),
    [(PPOTrainer, PPO), (PPOTrainer, PPO | {"peft": False}), (DurableGRPOTrainer, {"peft": False})],
    ids=["PPO, adapters", "PPO, all weights", "GRPO, all weights"],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(make_trainer, trainer_class, options, stopped_at):
    options = {
        **options,
        "trainer_class": trainer_class,
        "reward": adds_up,
        "num_generations": 4,
        "num_iterations": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_only_model": False,
    }
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{stopped_at}")
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    for name in ("reward", "kl", "value/loss", "beta", "loss"):
        assert logged(resumed, name)[-2:] == logged(whole, name)[-2:], name


def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": True}
    trainer = make_trainer(reward=adds_up, peft=False, eval_dataset=Dataset.from_list(ROWS[:8]), **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    for name, value in load_file(f"{best}/value_head.safetensors").items():
        assert torch.equal(trainer._policy.value_head.state_dict()[name], value)
    loaded = AutoModelForCausalLM.from_pretrained(best).state_dict()
    assert all(torch.equal(value, trainer._policy.state_dict()[name]) for name, value in loaded.items())


def test_checkpoints_carry_the_value_head_and_load_without_it(make_trainer, tmp_path):
    trainer = make_trainer(peft=False, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    head = load_file(tmp_path / "saved" / "value_head.safetensors")
    assert not any("value_head" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    again = make_trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), value_head=str(tmp_path / "saved"))
    for name, value in again._policy.value_head.state_dict().items():
        assert torch.equal(value, head[name])
    ids = torch.randint(3, len(WORDS), (2, 6))
    read = lambda trainer: trainer._policy.eval()(ids, labels=ids, fused_lm_head=True, num_states=6).state_values  # noqa: E731
    assert torch.equal(read(trainer), read(again)) and read(again).abs().sum() > 0


def test_without_its_adapter_the_policy_is_the_base_model_to_the_bit(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    ids = torch.randint(3, len(WORDS), (2, 6))
    with torch.no_grad():
        expected = build().eval()(ids).logits
        model = trainer.model.eval()
        assert not torch.equal(model(ids).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)


def test_truncated_completions_can_be_left_out(make_trainer):
    trainer = make_trainer("qwen3_moe", reward=adds_up, mask_truncated_completions=True, lam=1.0)
    batch = rollout(trainer)
    ended = (batch["completion_ids"] == trainer._tokenizer.eos_token_id).any(dim=1)
    assert 0 < ended.sum() < len(ended)
    assert torch.equal(batch["value_mask"].any(dim=1), ended)
    assert not batch["advantages"][~ended].any() and batch["advantages"][ended].any()


def test_a_server_of_completions_is_not_sent_the_critic(make_trainer):
    policy = make_trainer()._policy
    head = policy.value_head
    with _without_value_head(policy):
        assert not any("value_head" in name for name, _ in policy.named_parameters())
    assert policy.value_head is head


def test_the_balancing_loss_works_on_phi_moe(make_trainer):
    trainer = make_trainer(router_aux_loss_coef=0.01)
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "aux_loss"))


def test_adapters_of_a_policy_in_4_bits_learn_in_full_precision(make_trainer, tmp_path):
    build().save_pretrained(tmp_path / "base")
    policy = load_causal_lm(str(tmp_path / "base"), "bfloat16", load_in_4bit=True, device_map={"": "cpu"})
    trainer = make_trainer(policy, reward=adds_up, experts=False, num_iterations=2, max_steps=4)
    learned = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all(value.dtype == torch.float32 for value in learned.values())
    trainer.train()
    assert any(not torch.equal(trainer.model.get_parameter(name), value) for name, value in learned.items())


def test_a_horizon_below_a_rollout_changes_beta_by_a_fifth_at_most(make_trainer):
    trainer = make_trainer(kl_target=100.0, kl_horizon=1, max_steps=3, beta=0.5)
    trainer.train()
    assert logged(trainer, "beta") == pytest.approx([0.5 * 0.8, 0.5 * 0.8**2, 0.5 * 0.8**3])


def test_evaluation_reports_rewards_and_leaves_no_trace(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    before = weights(trainer)
    metrics = trainer.evaluate(Dataset.from_list(ROWS[:8]))
    assert {"eval_reward", "eval_loss", "eval_value/loss"} <= set(metrics) | set(trainer.state.log_history[-1])
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_rewards_that_never_differ_are_told(make_trainer, caplog):
    trainer = make_trainer(reward=lambda completions, **kwargs: [0.25] * len(completions), max_steps=SILENT_ROLLOUTS)
    with caplog.at_level(logging.WARNING, logger="mixturekit.trainers.ppo_trainer"):
        trainer.train()
    assert f"last {SILENT_ROLLOUTS} rollouts got the same reward, 0.25" in caplog.text


def test_bad_input_is_refused_in_one_sentence(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="router_replay is on, but LlamaForCausalLM is no mixture of experts"):
        make_trainer("llama", experts=False, router_replay="r2")
    with pytest.raises(FileNotFoundError, match="has no value_head.safetensors"):
        make_trainer(value_head=str(tmp_path))
    with pytest.raises(ValueError, match="critic_level is 'word': choose token or prompt or sequence"):
        make_trainer(critic_level="word")
    with pytest.raises(ValueError, match="with beta 0 there is no reference"):
        make_trainer(critic_features="ref", beta=0.0)
    with pytest.raises(ValueError, match="must be divisible by num_generations"):
        make_trainer(num_generations=3)
    with pytest.raises(ValueError, match="num_generations is 0: it must be at least 1"):
        make_trainer(num_generations=0)
    with pytest.raises(ValueError, match="sync_ref_model is not supported"):
        make_trainer(sync_ref_model=True)
    with pytest.warns(UserWarning, match="critic_level is 'sequence'"):
        PPOConfig(str(tmp_path), critic_level="sequence", use_cpu=True, bf16=False)


def test_trl_has_what_this_builds_on():
    """Each name below is private in TRL or transformers, or a key of a dictionary; an upgrade may change any."""
    signatures = {
        "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["inputs"],
        "_compute_loss": ["model", "inputs"],
        "create_optimizer": ["model"],
        "_save": ["output_dir", "state_dict"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
        "_load_best_model": [],
        "_save_rng_state": ["output_dir"],
        "_load_rng_state": ["checkpoint"],
    }
    for name, parameters in signatures.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:] == parameters, name
    scoring = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert scoring[1:6] == ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]


def test_a_batch_has_the_keys_that_trl_gives_and_needs(make_trainer):
    batch = rollout(make_trainer(num_iterations=2))
    given = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch"}
    given |= {"old_per_token_logps", "ref_per_token_logps"}
    added = {"advantages", "state_values", "returns", "value_mask", "num_values_in_batch"}
    assert set(batch) == given | added

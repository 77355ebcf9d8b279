"""The libraries that train transformers models train these: the Trainer, PEFT on attention and experts, and TRL."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from mixturekit.modeling import MoreForCausalLM

EXPERT_PARAMETERS = {
    "base": ["experts.gate_up_proj", "experts.down_proj"],
    "more_a": ["experts.adapter_state", "experts.adapter_input", "experts.qkv_proj", "experts.gate_up_proj"],
    "more_b": ["experts.up_proj", "experts.gru_hidden", "experts.gru_input", "experts.down_proj"],
    "more_c": ["experts.gate_up_proj", "experts.gru_hidden", "experts.gru_input"],
    "more_d": ["experts.down_proj", "experts.gru_hidden", "experts.gru_input"],
}


def lora_config(expert_type, target):
    if target == "attention":
        return LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    parameters = EXPERT_PARAMETERS[expert_type]
    return LoraConfig(r=4, target_modules=[], target_parameters=parameters, task_type="CAUSAL_LM")


@pytest.mark.parametrize("expert_type", EXPERT_PARAMETERS)
@pytest.mark.parametrize("target", ["attention", "experts"])
def test_lora_trains_saves_and_merges(expert_type, build_more, build_tokens, target, tmp_path):
    model, ids = build_more(expert_type=expert_type, num_experts_per_tok=2), build_tokens(2, 16)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids).logits
    adapted = get_peft_model(model, lora_config(expert_type, target)).train()
    trainable = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(parameter.grad.any() for parameter in trainable.values())
    adapted.eval()
    with torch.no_grad():
        trained = adapted(ids).logits
        assert (trained - before).abs().max() > 0.05
        adapted.save_pretrained(tmp_path)
        fresh = MoreForCausalLM(model.config)
        fresh.load_state_dict(state)
        loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
        torch.testing.assert_close(loaded(ids).logits, trained, atol=1e-3, rtol=1e-4)
        merged = loaded.merge_and_unload()
        assert type(merged) is MoreForCausalLM
        torch.testing.assert_close(merged(ids).logits, trained, atol=1e-3, rtol=1e-3)
    kwargs = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert merged.generate(ids, **kwargs).tolist() == adapted.generate(input_ids=ids, **kwargs).tolist()


def arguments(config_class, tmp_path, **options):
    return config_class(
        output_dir=tmp_path,
        max_steps=12,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        logging_steps=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **options,
    )


def fine_tune(model, tokenizer, sentences, tmp_path, **options):
    """Log entries of a short training, and the evaluations before and after."""
    trainer = SFTTrainer(
        model=model,
        args=arguments(SFTConfig, tmp_path, router_aux_loss_coef=0.02, **options),
        train_dataset=Dataset.from_dict({"text": sentences * 4}),
        eval_dataset=Dataset.from_dict({"text": sentences}),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], before, trainer.evaluate()


@pytest.mark.parametrize("expert_type", EXPERT_PARAMETERS)
def test_supervised_fine_tuning(expert_type, build_more, tokenizer, sentences, tmp_path):
    """TRL computes the loss from the base model itself, with the auxiliary loss of Mixtral."""
    model = build_more(expert_type=expert_type, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    logs, before, after = fine_tune(model, tokenizer, sentences, tmp_path)
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert after["eval_loss"] < before["eval_loss"] - 0.5
    assert before["eval_mean_token_accuracy"] < after["eval_mean_token_accuracy"]
    assert all(0.5 < entry["aux_loss"] <= 4 for entry in logs)


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 16}, {"loss_type": "dft"}], ids=["packed", "dft"])
@pytest.mark.parametrize("expert_type", ["base", "more_a"])
def test_other_ways_of_fine_tuning(expert_type, build_more, tokenizer, sentences, tmp_path, options):
    """Documents packed into one row, told apart by their positions; and a loss that needs all logits."""
    model = build_more(expert_type=expert_type, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    logs, before, after = fine_tune(model, tokenizer, sentences, tmp_path, **options)
    assert after["eval_mean_token_accuracy"] > before["eval_mean_token_accuracy"] + 0.2
    assert all(entry["aux_loss"] > 0 for entry in logs)


@pytest.mark.parametrize("expert_type", ["base", "more_a"])
def test_trainer_losses_do_not_depend_on_accumulation(expert_type, build_more, sentences, tokenizer, tmp_path):
    """A batch of four and four of one: the same losses and gradients, auxiliary losses included."""
    encoded = dict(tokenizer(sentences, padding=True, padding_side="right"))
    encoded["labels"] = (
        torch.tensor(encoded["input_ids"]).where(torch.tensor(encoded["attention_mask"]) == 1, -100).tolist()
    )
    logs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        options = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
        model = build_more(expert_type=expert_type, vocab_size=len(tokenizer), **options)
        # Plain gradient descent, which does not blow up the rounding of small gradients as Adam does.
        args = arguments(TrainingArguments, tmp_path, optim="sgd", gradient_accumulation_steps=accumulation)
        args.per_device_train_batch_size, args.learning_rate, args.max_steps, args.logging_steps = batch, 1e-3, 3, 1
        trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_dict(encoded))
        trainer.train()
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 3
    for whole, accumulated in zip(*logs, strict=True):
        assert whole == pytest.approx(accumulated, rel=1e-2)
    assert logs[0][-1][0] < logs[0][0][0]

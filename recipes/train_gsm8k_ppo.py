"""Train a language model on GSM8K with PPO: a critic on the policy's own backbone, LoRA, router replay.

accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/train_gsm8k_ppo.py \
    --config recipes/gsm8k/phi_tiny_moe.yaml --output_dir out
"""

from pathlib import Path


def main() -> None:
    """Parses the arguments, trains, and says where the results are."""
    from mixturekit.trainers.gsm8k_training_config import GSM8KDataArguments, GSM8KModelArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence, leave_process_group_at_exit

    with errors_in_one_sentence(needs="rl"):
        from mixturekit.trainers.ppo_config import PPOConfig

        arguments = parse_recipe((GSM8KModelArguments, GSM8KDataArguments, PPOConfig), description=__doc__)
        leave_process_group_at_exit()
        train(*arguments)


def train(model_arguments, arguments, config) -> None:
    """Loads, warms up if asked to, trains, and evaluates before and after."""
    from mixturekit.trainers.card_figures import draw_curve
    from mixturekit.trainers.checkpoints import remove_checkpoints
    from mixturekit.trainers.expert_adapters import load_causal_lm, memory_report
    from mixturekit.trainers.gsm8k_training import (
        check_arguments,
        evaluate,
        load_policy,
        load_splits,
        make_trainer,
        warm_start,
        warm_start_folder,
    )
    from mixturekit.trainers.language_modeling import check_output_dir
    from mixturekit.trainers.ppo_card import CURVES
    from mixturekit.trainers.process_checks import check_processes
    from mixturekit.trainers.zero_offload import check_zero_offload

    check_processes(config.use_cpu)
    check_zero_offload(config, model_arguments.nvme_path)
    check_arguments(model_arguments, arguments, config)
    checkpoint = check_output_dir(config)
    problems, held_out = load_splits(arguments)
    model, tokenizer = load_policy(model_arguments, problems, config)
    main_process = config.process_index == 0
    if main_process:
        print(memory_report(model))
        if not checkpoint:
            remove_checkpoints(config.output_dir)
    if arguments.warm_start_steps:
        if not checkpoint:
            warm_start(model, tokenizer, problems, arguments, config, model_arguments.nvme_path)
        # From the folder also where the policy is at hand: what its trainer has set up in it is not for the next one.
        model = load_causal_lm(str(warm_start_folder(config)), model_arguments.dtype)
    trainer = make_trainer(model, tokenizer, model_arguments, arguments, config, problems, held_out)
    judge = lambda name: evaluate(trainer.model, tokenizer, held_out, arguments, config, name)  # noqa: E731
    before = None if checkpoint else judge("eval_before")
    trainer.train(resume_from_checkpoint=checkpoint)
    # What it would push lacks the last evaluation still.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    after = judge("eval_after")
    if config.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    if main_process:
        picture = Path(config.output_dir, "training.png")
        draw_curve(trainer.state.log_history, CURVES, picture)
        for name, record in (("before", before), ("after", after)):
            if record is not None:
                low, high = (100 * record[bound] for bound in ("low", "high"))
                print(f"Held-out exact match {name}: {100 * record['value']:.1f} % ({low:.1f} to {high:.1f})")
        print(f"Policy, logs and completions are in {config.output_dir}; curves: {picture}")


if __name__ == "__main__":
    main()

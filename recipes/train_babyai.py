"""Train a policy of pathways to follow instructions in BabyAI, by imitating BabyAI's bot.

accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/train_babyai.py \
    --config recipes/babyai/quickstart.yaml --env_id BabyAI-GoToRedBall-v0 --algorithm dagger --output_dir out
"""


def main() -> None:
    """Parses the arguments, trains, and says where the results are."""
    from mixturekit.trainers.imitation_config import EnvironmentArguments, ImitationConfig, PolicyArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence, leave_process_group_at_exit

    with errors_in_one_sentence():
        arguments = parse_recipe((PolicyArguments, EnvironmentArguments, ImitationConfig), description=__doc__)
        from mixturekit.trainers.imitation import train_policy

        leave_process_group_at_exit()
        metrics = train_policy(*arguments)
    config = arguments[-1]
    if config.process_index == 0:
        print(f"Held-out success {100 * metrics['eval_success']:.1f} % after {metrics['updates']} updates.")
        print(f"Policy, metrics and logs are in {config.output_dir}")
        print(f"Curves: tensorboard --logdir {config.output_dir}")


if __name__ == "__main__":
    main()

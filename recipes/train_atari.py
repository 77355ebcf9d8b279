"""Train an agent of many experts on games one after another, by PPO, and measure what it forgets.

accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/train_atari.py \
    --config recipes/atari/quickstart.yaml --games builtin:catch builtin:rally --output_dir out
"""


def main() -> None:
    """Parses the arguments, trains, and says where the results are."""
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence, leave_process_group_at_exit

    with errors_in_one_sentence(needs="atari"):
        from mixturekit.trainers.continual_ppo_config import AgentArguments, ContinualPpoConfig, GameArguments

        arguments = parse_recipe((AgentArguments, GameArguments, ContinualPpoConfig), description=__doc__)
        from mixturekit.trainers.continual import train_agent
        from mixturekit.trainers.continual_results import RESULTS

        leave_process_group_at_exit()
        results = train_agent(*arguments)
    config = arguments[-1]
    if config.process_index:
        return
    if not results["finished"]:
        print(f"Stopped after {results['updates']} updates; go on with --resume_from_checkpoint last")
    elif results["evaluations"]:
        for game, first, last in zip(
            results["games"], results["random_returns"], results["evaluations"][-1], strict=True
        ):
            print(f"{game}: return {last['return']:.2f}, random actions {first:.2f}")
    print(f"Agent, checkpoints and {RESULTS} are in {config.output_dir}")
    print(f"Curves: tensorboard --logdir {config.output_dir}")
    print(f"Report: python recipes/report_continual.py --run {config.output_dir}")


if __name__ == "__main__":
    main()

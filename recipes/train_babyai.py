"""Train a policy of pathways to follow instructions in BabyAI, by imitating BabyAI's bot.

accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/train_babyai.py \
    --config recipes/babyai/quickstart.yaml --env_id BabyAI-GoToRedBall-v0 --algorithm dagger --output_dir out
"""

import atexit
import sys


def main() -> None:
    """Parses the arguments, trains, and says where the results are."""
    from mixturekit.trainers.imitation_config import EnvironmentArguments, ImitationConfig, PolicyArguments
    from mixturekit.trainers.recipe_parser import parse_recipe

    try:
        arguments = parse_recipe((PolicyArguments, EnvironmentArguments, ImitationConfig), description=__doc__)
        from accelerate import PartialState

        from mixturekit.trainers.imitation import train_policy

        # Gloo's threads now and then abort a process that exits within its group.
        atexit.register(lambda: PartialState().destroy_process_group())
        metrics = train_policy(*arguments)
    except ImportError as error:
        if error.name is not None:
            raise
        # Without the name of a module, it is the sentence that says what to install.
        sys.exit(str(error))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    config = arguments[-1]
    if config.process_index == 0:
        print(f"Held-out success {100 * metrics['eval_success']:.1f} % after {metrics['updates']} updates.")
        print(f"Policy, metrics and logs are in {config.output_dir}")
        print(f"Curves: tensorboard --logdir {config.output_dir}")


if __name__ == "__main__":
    main()

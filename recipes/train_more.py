"""Train a MoRE language model, on text or on the built-in stories and sums.

accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/train_more.py \
    --config recipes/more/quickstart.yaml --expert_type more_c --output_dir out
"""

import atexit
import sys


def main() -> None:
    """Parses the arguments, trains, and says where the results are."""
    from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig, ModelArguments
    from mixturekit.trainers.recipe_parser import parse_recipe

    try:
        arguments = parse_recipe((ModelArguments, DataArguments, LanguageModelingConfig), description=__doc__)
        from accelerate import PartialState

        from mixturekit.trainers.language_modeling import train_language_model

        # Gloo's threads now and then abort a process that exits within its group.
        atexit.register(lambda: PartialState().destroy_process_group())
        metrics = train_language_model(*arguments)
    except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    config = arguments[-1]
    if config.process_index == 0:
        print(f"Held-out perplexity {metrics['eval_perplexity']:.2f} after {metrics['steps']} steps.")
        print(f"Model, tokenizer, metrics and logs are in {config.output_dir}")
        print(f"Curves: tensorboard --logdir {config.output_dir}")


if __name__ == "__main__":
    main()

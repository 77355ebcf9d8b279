"""Evaluate a language model on GSM8K: pass@1 greedy, pass@k sampled and a majority vote, with intervals.

accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/evaluate_gsm8k.py \
    --model_name_or_path microsoft/Phi-tiny-MoE-instruct --num_samples 8 --output_dir eval
"""

import atexit
import sys
from pathlib import Path


def main() -> None:
    """Parses the arguments, evaluates, and says where the results are."""
    from mixturekit.trainers.gsm8k_evaluation_config import GSM8KEvaluationArguments
    from mixturekit.trainers.recipe_parser import parse_recipe

    try:
        (arguments,) = parse_recipe((GSM8KEvaluationArguments,), description=__doc__)
        from accelerate import PartialState

        state = PartialState(cpu=arguments.use_cpu)
        # Gloo's threads now and then abort a process that exits within its group.
        atexit.register(state.destroy_process_group)
        evaluate(arguments, state.is_main_process)
    except ImportError as error:
        sys.exit(f"{str(error).rstrip('.')}. The extra mixturekit[rl] has what this recipe needs.")
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted: what was finished is in the files, and --resume goes on from there.")


def evaluate(arguments, is_main_process: bool) -> None:
    """Evaluates, and prints in the main process."""
    from mixturekit.trainers.expert_adapters import memory_report
    from mixturekit.trainers.gsm8k_evaluation import (
        COMPLETIONS,
        RESULTS,
        GSM8KEvaluation,
        load_evaluated_model,
        load_problems,
        print_results,
    )

    problems, shots = load_problems(arguments)
    model, tokenizer = load_evaluated_model(arguments)
    evaluation = GSM8KEvaluation(model, tokenizer, arguments, problems, shots)
    if is_main_process:
        print(memory_report(model))
    report = evaluation.run()
    if is_main_process:
        print_results(report["results"])
        folder = Path(arguments.output_dir)
        print(f"Results: {folder / RESULTS}; completions: {folder / COMPLETIONS}")


if __name__ == "__main__":
    main()

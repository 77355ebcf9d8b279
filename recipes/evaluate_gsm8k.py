"""Evaluate a language model on GSM8K: pass@1 greedy, pass@k sampled and a majority vote, with intervals.

accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/evaluate_gsm8k.py \
    --model_name_or_path microsoft/Phi-tiny-MoE-instruct --num_samples 8 --output_dir eval
"""

from pathlib import Path


def main() -> None:
    """Parses the arguments, evaluates, and says where the results are."""
    from mixturekit.trainers.gsm8k_evaluation_config import GSM8KEvaluationArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence, leave_process_group_at_exit

    rest = "what was finished is in the files, and --resume goes on from there."
    with errors_in_one_sentence(needs="rl", interrupted=rest):
        (arguments,) = parse_recipe((GSM8KEvaluationArguments,), description=__doc__)
        from accelerate import PartialState

        state = PartialState(cpu=arguments.use_cpu)
        leave_process_group_at_exit()
        evaluate(arguments, state.is_main_process)


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

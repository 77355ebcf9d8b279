"""Evaluate a language model: perplexity, bAbI, arithmetic and generation, at several numbers of recurrences.

accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/evaluate_more.py --model_name_or_path out \
    --tasks babi2 babi3 arithmetic generation --num_recurrences 1 2 4 8 --output_dir eval
"""

from pathlib import Path


def main() -> None:
    """Parses the arguments, evaluates, and says where the results are."""
    from mixturekit.trainers.language_evaluation_config import EvaluationArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence, leave_process_group_at_exit
    from mixturekit.trainers.task_data import TaskArguments, saved_task_arguments

    types = (EvaluationArguments, TaskArguments)
    with errors_in_one_sentence(interrupted="what was finished is in the files."):
        source = parse_recipe(types, description=__doc__)[0].model_name_or_path
        # What the model was trained on is what it is asked, unless the command line says otherwise.
        arguments, task_arguments = parse_recipe(types, defaults=saved_task_arguments(source))
        from accelerate import PartialState

        state = PartialState(cpu=arguments.use_cpu)
        leave_process_group_at_exit()
        evaluate(arguments, task_arguments, state.is_main_process)


def evaluate(arguments, task_arguments, is_main_process: bool) -> None:
    """Evaluates, and in the main process prints, draws and adds to the model card."""
    from mixturekit.trainers.evaluation_report import PICTURE, draw_results, print_results, update_model_card
    from mixturekit.trainers.language_evaluation import (
        RESULTS,
        LanguageModelEvaluation,
        load_evaluated_model,
        load_evaluation_data,
        routing_report_path,
    )

    if arguments.update_model_card and not Path(arguments.model_name_or_path, "README.md").is_file():
        raise FileNotFoundError(f"There is no model card in {arguments.model_name_or_path} to update.")
    data = load_evaluation_data(arguments, task_arguments)
    model, tokenizer = load_evaluated_model(arguments)
    evaluation = LanguageModelEvaluation(model, tokenizer, arguments, task_arguments, data)
    if arguments.num_recurrences and evaluation.depths == [None] and is_main_process:
        print(f"{arguments.model_name_or_path} has no recurrent experts, so it is evaluated once.")
    report = evaluation.run()
    if not is_main_process:
        return
    print_results(report["results"])
    picture = Path(arguments.output_dir, PICTURE)
    draw_results(report["results"], picture)
    print(f"Results: {Path(arguments.output_dir, RESULTS)}; scores against recurrences: {picture}")
    if arguments.csv is not None:
        routes = routing_report_path(arguments.csv)
        print(f"Questions and answers: {arguments.csv}" + (f"; routes: {routes}" if routes.exists() else ""))
    if arguments.update_model_card:
        print(f"Updated: {', '.join(map(str, update_model_card(report, arguments.model_name_or_path)))}")


if __name__ == "__main__":
    main()

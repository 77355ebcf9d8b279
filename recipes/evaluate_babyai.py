"""Evaluate a policy of pathways on held-out episodes of BabyAI, beside the bot on the same seeds.

accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/evaluate_babyai.py \
    --model_name_or_path out --num_episodes 512 --self_sufficiency --lesion --video eval/episode.gif --output_dir eval
"""

from pathlib import Path


def main() -> None:
    """Parses the arguments, evaluates, and says where the results are."""
    from mixturekit.trainers.policy_evaluation_config import PolicyEvaluationArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence, leave_process_group_at_exit

    with errors_in_one_sentence(interrupted="what was finished is in the files."):
        (arguments,) = parse_recipe((PolicyEvaluationArguments,), description=__doc__)
        from accelerate import PartialState

        state = PartialState(cpu=arguments.use_cpu)
        leave_process_group_at_exit()
        evaluate(arguments, state.is_main_process)


def evaluate(arguments, is_main_process: bool) -> None:
    """Evaluates, and in the main process prints, draws and films."""
    import torch

    from mixturekit.trainers.episode_video import film_episode
    from mixturekit.trainers.policy_evaluation import PolicyEvaluation, load_evaluated_policy
    from mixturekit.trainers.policy_evaluation_config import RESULTS
    from mixturekit.trainers.policy_evaluation_report import PICTURE, draw_curves, print_results

    torch.set_num_threads(arguments.num_threads)
    policy, levels = load_evaluated_policy(arguments)
    report = PolicyEvaluation(policy, levels, arguments).run()
    if not is_main_process:
        return
    print_results(report["results"])
    print(f"Results: {Path(arguments.output_dir, RESULTS)}")
    picture = Path(arguments.output_dir, PICTURE)
    if draw_curves(report["results"], picture):
        print(f"Success against the weights that are left out: {picture}")
    if arguments.video:
        seed = arguments.first_seed if arguments.video_seed is None else arguments.video_seed
        episode = film_episode(policy, levels[0], seed, arguments.video)
        print(f"Video of {levels[0]}, seed {seed}, return {episode.episode_return:.2f}: {arguments.video}")


if __name__ == "__main__":
    main()

"""Evaluate an agent of many experts on whole episodes of its games, with a video of the experts in use.

accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/evaluate_atari.py \
    --model_name_or_path out --num_episodes 16 --video eval/episode.gif --output_dir eval
"""

from pathlib import Path


def main() -> None:
    """Parses the arguments, evaluates, and says where the results are."""
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence

    with errors_in_one_sentence(needs="atari"):
        from mixturekit.trainers.agent_evaluation_config import AgentEvaluationArguments

        (arguments,) = parse_recipe((AgentEvaluationArguments,), description=__doc__)
        evaluate(arguments)


def evaluate(arguments) -> None:
    """Evaluates, prints and films."""
    import torch

    from mixturekit.trainers.agent_evaluation_config import RESULTS
    from mixturekit.trainers.agent_evaluation_report import evaluate_agent, evaluated_agent, print_results
    from mixturekit.trainers.agent_video import film_agent

    torch.set_num_threads(arguments.num_threads)
    with evaluated_agent(arguments) as (agent, store):
        print_results(evaluate_agent(agent, store, arguments))
        print(f"Results: {Path(arguments.output_dir, RESULTS)}")
        if arguments.video:
            game = (arguments.games or agent.config.games)[0]
            played = film_agent(
                agent, game, arguments.first_seed, arguments.video, arguments.video_steps, arguments.preprocessing,
                arguments.tell_game, arguments.deterministic,
            )  # fmt: skip
            print(f"Video of {game}, return {played.returns[0]:g}: {arguments.video}")


if __name__ == "__main__":
    main()

"""Push a trained model to the Hub, with its code, a card of what was measured and nothing of this machine; or data.

python recipes/push_to_hub.py --model_name_or_path out --repo_id user/name --dry_run
python recipes/push_to_hub.py --model_name_or_path out --evaluation eval --repo_id user/name
python recipes/push_to_hub.py --demonstrations generated --env_id BabyAI-GoToLocal-v0 --repo_id user/demonstrations
python recipes/push_to_hub.py --completions eval --repo_id user/solutions
"""

import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Parses the arguments, puts the files together, validates them, and sends them."""
    from mixturekit.trainers.hub_push_config import PushArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence

    with errors_in_one_sentence(needs="rl,babyai"):
        (arguments,) = parse_recipe((PushArguments,), description=__doc__)
        from mixturekit.trainers.hub_push import PushError

        try:
            with tempfile.TemporaryDirectory() as folder:
                run(arguments, Path(folder))
        except PushError as error:
            sys.exit(str(error))


def run(arguments, folder: Path) -> None:
    """Shows or sends what is in order; anything else ends with a sentence for each problem."""
    from huggingface_hub import constants

    from mixturekit.trainers.hub_contents import gather_contents
    from mixturekit.trainers.hub_push import describe, problems_of, push

    contents = gather_contents(arguments, folder)
    contents.write_card()
    problems = problems_of(contents, arguments.kind)
    if arguments.dry_run:
        print("\n".join(describe(contents, arguments, problems)))
        sys.exit(1 if problems else None)
    if problems:
        raise ValueError(" ".join(problems))
    revision = push(contents, arguments)
    place = f"{constants.ENDPOINT}/{'' if arguments.kind == 'model' else 'datasets/'}{arguments.repo_id}"
    print(f"{place} is there, with {len(contents.files())} files; revision {revision}")


if __name__ == "__main__":
    main()

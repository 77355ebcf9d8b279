"""One HTML page on a run over several games: retention matrix, hit rates, and which game uses which experts.

python recipes/report_continual.py --run out --output out/report.html
"""

import argparse
from pathlib import Path


def main() -> None:
    """Writes the page and says where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of train_atari.py")
    parser.add_argument("--output", help="the page; report.html in the folder if unset")
    arguments = parser.parse_args()
    from mixturekit.trainers.continual_report import write_continual_report
    from mixturekit.trainers.recipe_process import errors_in_one_sentence

    path = Path(arguments.output or Path(arguments.run, "report.html"))
    with errors_in_one_sentence():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_continual_report(arguments.run, path)
    print(f"Report: {path}")


if __name__ == "__main__":
    main()

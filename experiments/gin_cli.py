"""Run a function that gin configures: `--gin_file F ... --gin_bindings B ...`, as T5X spells it."""

import argparse
import logging

import gin


def main(entry: str, description: str) -> None:
    """Parse the command line, bind what the files and bindings say, and call the entry through gin.

    `entry` is the name that the gin files give to it, such as `quickstart.run`. gin acts on what is reached
    through it, so functions are handed down as arguments (`@module.function`); the library itself knows
    nothing of gin.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--gin_file", action="append", required=True, help="a gin file; later ones override")
    parser.add_argument("--gin_bindings", action="append", default=[], help="such as 'SEED = 1'")
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        gin.parse_config_files_and_bindings(args.gin_file, args.gin_bindings)
    except (ValueError, OSError, SyntaxError, AttributeError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    gin.get_configurable(entry)()

"""`fishjax train`: make a patch as a gin file says."""

import argparse

HELP = "train a patch as a gin file says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gin_file",
        metavar="G",
        action="append",
        required=True,
        help="binds `contribute.run`; may be repeated",
    )
    parser.add_argument(
        "--gin_bindings",
        metavar="B",
        action="append",
        default=[],
        help="such as 'contribute.run.steps = 100'",
    )


def run(args: argparse.Namespace) -> None:
    import logging

    from fishjax.errors import UsageError

    try:
        import gin
    except ImportError:
        raise UsageError('`fishjax train` needs gin-config: pip install "fishjax[gin]"') from None
    logging.getLogger("absl").setLevel(logging.ERROR)
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings(args.gin_file, args.gin_bindings)
        contribute = gin.get_configurable("contribute.run")
    except (ValueError, OSError, SyntaxError, AttributeError, ImportError) as error:
        raise UsageError(f"the gin configuration is wrong: {' '.join(str(error).split())}") from None
    print(contribute())

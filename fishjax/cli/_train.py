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
    several = parser.add_argument_group("several processes, one command each")
    several.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0; `auto` leaves it to jax's detectors (TPU)"
    )
    several.add_argument("--processes", metavar="N", type=int, help="how many there are")
    several.add_argument("--process", metavar="I", type=int, help="which one this is, from 0")
    several.add_argument("--timeout", metavar="S", type=float, default=300.0, help="seconds to wait for all")


def run(args: argparse.Namespace) -> None:
    import logging

    from fishjax.errors import FishjaxError, UsageError

    try:
        import gin
    except ImportError:
        raise UsageError('`fishjax train` needs gin-config: pip install "fishjax[gin]"') from None
    logging.getLogger("absl").setLevel(logging.ERROR)
    if args.coordinator:
        from fishjax import mesh

        auto = args.coordinator == "auto"
        mesh.connect(None if auto else args.coordinator, args.processes, args.process, timeout=args.timeout)
    elif args.processes or args.process:
        raise UsageError("`--processes` and `--process` need `--coordinator HOST:PORT`")
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings(args.gin_file, args.gin_bindings)
        contribute = gin.get_configurable("contribute.run")
    except (ValueError, OSError, SyntaxError, AttributeError, ImportError) as error:
        raise UsageError(f"the gin configuration is wrong: {' '.join(str(error).split())}") from None
    try:
        print(contribute())
    except (FishjaxError, OSError) as error:
        raise _without_gin(error) from None


def _without_gin(error: BaseException) -> BaseException:
    """Return the error itself: gin raises a stand-in, without a file's name, for each function on the way."""
    while "In call to configurable" in str(error) and error.__context__ is not None:
        error = error.__context__
    return error

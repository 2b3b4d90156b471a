"""Errors that a person can act on, and the exit code each one has on the command line."""


class FishjaxError(ValueError):
    """A request that cannot be carried out; nothing was written."""

    exit_code = 2


class UsageError(FishjaxError):
    """An argument, option or file name that makes no sense."""

    exit_code = 2


class FileFormatError(FishjaxError):
    """A file that is malformed, unsafe or corrupt."""

    exit_code = 3


class StructureError(FishjaxError):
    """Trees that should fit each other (names, shapes, dtypes) and do not."""

    exit_code = 4


class WrongBaseError(StructureError):
    """A patch that was made for another base."""

    exit_code = 4


class ConflictError(FishjaxError):
    """Contributions that cannot both be taken as they are."""

    exit_code = 5


class ProvenanceError(FishjaxError):
    """A contribution whose origin is missing or not trusted."""

    exit_code = 6

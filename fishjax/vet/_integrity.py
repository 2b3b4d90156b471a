"""Integrity: the file is whole, strict and what it says it is."""

from fishjax.errors import FileFormatError
from fishjax.vet._context import Context, Finding


def integrity(context: Context) -> Finding:
    """Read the patch's file again, every byte of it: header, whole-file digest, indices, manifest.

    A malformed or changed file is exit code 3, which ends the vetting. NaN and infinity are left to the check
    of finiteness, which is a matter of policy.
    """
    if context.file is None or context.source is None:
        return Finding("integrity", "skip", 0, "the patch is in memory, it was not read from a file", {})
    from fishjax.checkpoint import read_patch

    digest = read_patch(context.file, check_finite=False).digest
    if digest != context.source.digest:
        raise FileFormatError(f"`{context.file.name}` was changed while it was vetted; vet it again")
    size = context.file.stat().st_size
    tensors = sum(len(change.arrays) for change in context.source.changes.values())
    details = {"digest": digest, "bytes": size, "tensors": tensors}
    return Finding("integrity", "pass", 0, f"{tensors} tensors, {size:,} bytes, {digest[:23]}…", details)

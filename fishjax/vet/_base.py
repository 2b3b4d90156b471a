"""Base: the patch was made for this very model."""

from fishjax.checkpoint._digest import flat_leaves, leaf_digest, root
from fishjax.vet._context import Context, Finding


def base(context: Context) -> Finding:
    """Hold the base's content id, and the digest of every leaf touched, to those in the patch's manifest.

    Leaves are hashed one at a time; the model is never held. A misfit is exit code 4.
    """
    if context.source is None:
        return Finding("base", "skip", 0, "the patch is in memory, so it names no base", {})
    leaves = flat_leaves(context.base)
    digests = {name: leaf_digest(name, leaves[name]) for name in leaves}
    wanted, got = context.source.base_id, root(digests)
    differ = sorted(n for n, d in context.source.base_digests.items() if digests.get(n) != d)
    details = {
        "base_id": got,
        "wanted": wanted,
        "touched": len(context.source.base_digests),
        "differ": differ,
    }
    if differ:
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        text = f"the patch is for another base: `{differ[0]}`{more} of it is not what the patch was made for"
        return Finding("base", "fail", 4, text, details)
    if got != wanted:
        text = (
            f"the patch is for base {wanted[:19]}…, this is {got[:19]}… (only leaves it leaves alone differ)"
        )
        return Finding("base", "fail", 4, text, details)
    return Finding("base", "pass", 0, f"{got[:23]}…, {len(digests)} leaves", details)

"""Vet a patch file against a model on disk: what `fishjax vet` does."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from fishjax.checkpoint import load_params, open_params, read_patch
from fishjax.checkpoint._orbax import is_orbax
from fishjax.errors import FileFormatError
from fishjax.types import Fisher
from fishjax.vet._context import Context, Finding
from fishjax.vet._downstream import load_downstream
from fishjax.vet._packs import Pack
from fishjax.vet._policy import Policy
from fishjax.vet._run import CHECKS, ON_FILES, Check, Report, report, run


def files(
    patch: str | os.PathLike,
    base: str | os.PathLike,
    *,
    policy: Policy | None = None,
    tests: Sequence[Pack] = (),
    fisher: Fisher | None = None,
    downstream: str | os.PathLike | None = None,
    checks: Sequence[Check] = CHECKS,
) -> Report:
    """Vet a patch file for a model folder, or for a bare .safetensors file, which cannot be run.

    The model is loaded only if there are tests and the patch fits; a misfit is told without jax.

    Args:
      patch: the patch file.
      base: a folder with config.json, or a file of parameters.
      policy: the maintainer's limits; the defaults where there is none.
      tests: held test packs, as of `load_packs`.
      downstream: a folder of patches accepted before, to be applied again on the changed model.
      fisher: a diagonal Fisher of the base, to rank the layers by.

    Raises:
      FileNotFoundError: there is no such patch or base.
      FileFormatError: the base is malformed. (A malformed patch is a finding.)
    """
    patch, base = Path(patch), Path(base)
    with contextlib.ExitStack() as opened:
        # Tensors are mapped one at a time, so no more than the largest is held.
        params = load_params(base) if is_orbax(base) else opened.enter_context(open_params(base))
        try:
            source = read_patch(patch, check_finite=False)
        except FileFormatError as error:
            return report([Finding("integrity", "fail", 3, str(error), {})])
        context = Context(
            source.changes,
            params,
            tests=tests,
            policy=policy or Policy(),
            metadata=source.metadata,
            source=source,
            file=patch,
            fisher=fisher,
        )
        first = run(context, [check for check in checks if check in ON_FILES])
        if downstream is not None and first.exit_code not in (3, 4):
            tasks = load_downstream(downstream, base_id=source.base_id)
            context = context._replace(downstream=tasks)
        if tests and first.exit_code not in (3, 4) and (base / "config.json").exists():
            from fishjax import models

            model, params = models.load(base)
            context = context._replace(
                base=params,
                apply=model.apply if model.labels else None,  # hidden states are no predictions
                labels=model.labels,
                token_mask=model.token_mask,
            )
        return run(context._replace(findings=first.findings), [c for c in checks if c not in ON_FILES])

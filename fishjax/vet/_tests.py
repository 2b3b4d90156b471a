"""Tests: what the maintainer's held examples say before and after, by paired exact statistics."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fishjax.vet._context import Context, Finding, Status, blocked, claims
from fishjax.vet._packs import Pack
from fishjax.vet._statistics import holm, lower_bound, mcnemar, non_inferiority, smallest, upper_bound

MAX_CLASSES = 32  # up to so many classes, each is a slice of its own


class Flips(NamedTuple):
    """How the same `n` examples came out before and after."""

    n: int
    before: int  # right before
    after: int  # right after
    worse: int  # negative flips: right before, wrong after
    better: int  # positive flips

    @property
    def drop(self) -> float:
        """By how much the accuracy fell."""
        return (self.worse - self.better) / self.n


class Ruling(NamedTuple):
    """What one requirement on one test comes to. `needed` is how many examples could show it."""

    status: str  # "pass", "warn", "fail" or "inconclusive"
    text: str = ""
    needed: int | None = None


def tests(context: Context) -> Finding:
    """Compare the model before and after on every held test.

    For each test: the one-sided Clopper-Pearson upper bound of the negative-flip rate must be within
    `nfr_budget`; the fall in accuracy must be shown to be below `non_inferiority_margin`; and a test that
    the patch claims to raise must rise by `min_gain` with a one-sided exact McNemar test, Holm-adjusted over
    the claims. All must hold at once, so the first two need no adjustment (an intersection-union test).
    A requirement that is neither met nor missed for want of examples is inconclusive (7), never a pass.
    """
    policy = context.policy
    without = 7 if policy.require_tests else 0
    if reason := blocked(context):
        return Finding("tests", "skip", 0, reason, {})
    if not any(pack.owner != "contributor" for pack in context.tests):
        return Finding("tests", "skip", without, "no held test was given", {})
    if context.apply is None:
        return Finding("tests", "skip", without, "the base is no model with predictions; give its folder", {})
    from fishjax.vet import _evaluate

    base, new = _evaluate.models(context)
    outcomes = {
        p.name: (_evaluate.right(context, base, p), _evaluate.right(context, new, p)) for p in context.tests
    }
    return judge(context, outcomes)


def judge(context: Context, outcomes: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Finding:
    """Return the finding for the outcomes of each test, bool `[B]` before and after."""
    flips = {name: count_flips(*pair) for name, pair in outcomes.items()}
    claimed = [name for name in flips if name in claims(context)]
    losses = dict(
        zip(flips, holm([mcnemar(f.worse, f.better, alternative="greater") for f in flips.values()]))
    )
    gains = dict(
        zip(claimed, holm([mcnemar(flips[n].worse, flips[n].better, alternative="less") for n in claimed]))
    )
    rows, codes = [], set()
    for pack in context.tests:
        name, f = pack.name, flips[pack.name]
        limit = lambda key, name=name: context.policy.limit(key, name)
        confidence = context.policy.confidence
        kept = [
            rule_flips(f, limit("nfr_budget"), confidence),
            rule_accuracy(f, limit("non_inferiority_margin"), confidence, losses[name]),
        ]
        if not _supported(context, f):
            kept = [r._replace(status="warn") if r.status != "pass" else r for r in kept]
        rulings = kept + ([rule_gain(f, limit("min_gain"), confidence, gains[name])] if name in gains else [])
        status = _status(rulings, pack)
        codes.add({"fail": 1, "inconclusive": 7}.get(status, 0))
        slices = _slices(pack, *outcomes[name])
        weak = [s for s in slices if s["drop"] >= limit("non_inferiority_margin")]
        rows.append(
            {
                "name": name,
                "owner": pack.owner,
                "kind": pack.kind,
                "n": f.n,
                "accuracy_before": f.before / f.n,
                "accuracy_after": f.after / f.n,
                "negative_flips": f.worse,
                "positive_flips": f.better,
                "nfr_upper": upper_bound(f.worse, f.n, confidence=confidence),
                "mcnemar": mcnemar(f.worse, f.better),
                "loss": losses[name],
                "claimed": name in gains,
                "gain": gains.get(name),
                "status": "warn" if status == "pass" and weak else status,
                "reasons": [r.text for r in rulings if r.status != "pass"] + [_told(weak) for _ in weak[:1]],
                "examples_needed": max((r.needed for r in rulings if r.needed), default=None),
                "slices": slices,
            }
        )
    missing = sorted(claims(context) - flips.keys())
    if not claimed and not any(_supported(context, f) for f in flips.values()):
        codes.add(7 if context.policy.require_tests else 0)
    return _finding(rows, codes, missing)


def count_flips(before: np.ndarray, after: np.ndarray) -> Flips:
    """Count outcomes, bool `[B]` each.

    >>> count_flips(np.array([True, True, False]), np.array([True, False, True]))
    Flips(n=3, before=2, after=2, worse=1, better=1)
    """
    return Flips(
        len(before),
        int(before.sum()),
        int(after.sum()),
        int((before & ~after).sum()),
        int((~before & after).sum()),
    )


def rule_flips(f: Flips, budget: float, confidence: float) -> Ruling:
    """Rule on negative flips: the upper bound of their rate must be within the budget.

    >>> rule_flips(Flips(100, 90, 90, 0, 0), 0.02, 0.95).needed
    149
    """
    bound = upper_bound(f.worse, f.n, confidence=confidence)
    if bound <= budget:
        return Ruling("pass")
    rate = f.worse / f.n
    least = smallest(lambda n: upper_bound(0, n, confidence=confidence) <= budget)
    shown = lower_bound(f.worse, f.n, confidence=confidence) > budget
    if shown or (rate > budget and least is not None and f.n >= least):
        return Ruling(
            "fail", f"{f.worse} of {f.n} flipped to wrong ({rate:.2%}), over `nfr_budget` {budget:g}"
        )
    needed = smallest(lambda n: upper_bound(math.ceil(rate * n), n, confidence=confidence) <= budget)
    if f.worse == 0:
        text = f"{f.n} examples cannot show a negative-flip rate of at most {budget:g}"
    else:
        text = f"{f.worse} of {f.n} flipped to wrong; up to {bound:.2%} cannot be excluded, over {budget:g}"
    return Ruling("inconclusive", text, needed if rate < budget else least)


def rule_accuracy(f: Flips, margin: float, confidence: float, loss: float) -> Ruling:
    """Rule on accuracy: it must be shown not to fall by the margin. `loss` is McNemar's adjusted p-value.

    >>> rule_accuracy(Flips(600, 570, 569, 4, 3), 0.02, 0.95, 0.5)
    Ruling(status='pass', text='', needed=None)
    """
    alpha = 1 - confidence
    if non_inferiority(f.worse, f.better, f.n, margin=margin) < alpha:
        return Ruling("pass")
    least = smallest(lambda n: non_inferiority(0, 0, n, margin=margin) < alpha)
    if f.drop >= margin and (loss < alpha or (least is not None and f.n >= least)):
        return Ruling("fail", f"accuracy fell by {f.drop:.2%}, `non_inferiority_margin` is {margin:g}")

    def enough(n: int) -> bool:
        return non_inferiority(round(f.worse * n / f.n), round(f.better * n / f.n), n, margin=margin) < alpha

    text = f"{f.n} examples do not show that accuracy fell by less than {margin:g}"
    return Ruling("inconclusive", text, smallest(enough) if f.drop < margin else least)


def rule_gain(f: Flips, least_gain: float, confidence: float, p: float) -> Ruling:
    """Rule on a claimed gain; `p` is the adjusted one-sided p-value of "no gain".

    >>> rule_gain(Flips(100, 40, 90, 0, 50), 0.1, 0.95, 1e-9)
    Ruling(status='pass', text='', needed=None)
    """
    alpha = 1 - confidence
    if -f.drop >= least_gain and -f.drop > 0:
        if p < alpha:
            return Ruling("pass")

        def enough(n: int) -> bool:
            worse, better = round(f.worse * n / f.n), round(f.better * n / f.n)
            return mcnemar(worse, better, alternative="less") < alpha

        return Ruling(
            "inconclusive", f"the gain of {-f.drop:.2%} may be chance (p {p:.2g})", smallest(enough)
        )
    few = math.ceil(math.log(alpha) / math.log(0.5))  # with fewer examples no gain could be shown
    if f.n < few:
        return Ruling("inconclusive", f"{f.n} examples cannot show a gain", few)
    return Ruling("fail", f"the claimed gain is {-f.drop:.2%}, `min_gain` is {least_gain:g}")


def _supported(context: Context, f: Flips) -> bool:
    return f.before >= context.policy.supported_accuracy * f.n


def _status(rulings: list[Ruling], pack: Pack) -> str:
    """The worst ruling; what a contributor's own test cannot decide is left to the held ones."""
    found = {r.status for r in rulings}
    if "fail" in found:
        return "fail"
    if "inconclusive" in found and pack.owner != "contributor":
        return "inconclusive"
    return "pass" if found == {"pass"} else "warn"


def _slices(pack: Pack, before: np.ndarray, after: np.ndarray) -> list[dict[str, Any]]:
    """Return accuracy by slice; without slices of its own, a pack of few classes has one for each class."""
    slices = dict(pack.slices)
    if not slices and pack.kind == "mft" and pack.label is not None and pack.label.ndim == 1:
        classes = np.unique(pack.label)
        if len(classes) <= MAX_CLASSES:
            slices = {f"label={c}": pack.label == c for c in classes}
    rows = []
    for name, member in sorted(slices.items()):
        f = count_flips(before[member], after[member])
        if f.n:
            rows.append(
                {"name": name, "n": f.n, "before": f.before / f.n, "after": f.after / f.n, "drop": f.drop}
            )
    return sorted(rows, key=lambda row: (-row["drop"], row["name"]))


def _told(weak: list[dict[str, Any]]) -> str:
    worst, more = weak[0], f" (and {len(weak) - 1} more)" if len(weak) > 1 else ""
    fell = f"{worst['before']:.3f} -> {worst['after']:.3f}, n={worst['n']}"
    return f"slice `{worst['name']}` {fell}{more}"


def _finding(rows: list[dict[str, Any]], codes: set[int], missing: list[str]) -> Finding:
    code = 1 if 1 in codes else max(codes)
    warned = missing or any(row["status"] == "warn" for row in rows)
    if code == 7 and not any(row["status"] == "inconclusive" for row in rows):
        return Finding("tests", "fail", 7, "the base supports none of the held tests", {"tests": rows})
    parts = [
        f"{row['name']} {row['accuracy_before']:.3f} -> {row['accuracy_after']:.3f} (n={row['n']})"
        + (f": {'; '.join(row['reasons'])}" if row["reasons"] else "")
        + (f"; {row['examples_needed']} examples would be needed" if row["examples_needed"] else "")
        for row in rows
    ]
    if missing:
        parts.append(f"claimed but not held: {', '.join(f'`{n}`' for n in missing)}")
    status: Status = "fail" if code else "warn" if warned else "pass"
    return Finding("tests", status, code, " | ".join(parts), {"tests": rows, "claimed_not_held": missing})

"""A report for people (text, Markdown) and for machines (JSON, JUnit XML), equal bytes for equal findings."""

import json
import math
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from fishjax.vet._context import Finding
from fishjax.vet._run import Report


def to_text(report: Report, *, patch: str = "") -> str:
    """Return the report as a table for a terminal.

    >>> print(to_text(Report((Finding("size", "pass", 0, "4 numbers", {}),), "accept", 0)))
     1 size         PASS  4 numbers
    VERDICT accept (exit code 0)
    """
    lines = []
    for i, finding in enumerate(report.findings, 1):
        held = finding.details.get("tests")
        headline = f"{len(held)} held tests" if held else finding.summary
        lines.append(f"{i:2} {finding.name:12} {_word(finding)}  {headline}")
        lines += [f"{'':20}{line}" for line in _extra(finding)]
    name = f" {patch}" if patch else ""
    lines.append(f"VERDICT {report.verdict}{name} (exit code {report.exit_code})")
    return "\n".join(_printable(line) for line in lines)


def to_json(report: Report, *, patch: str = "", base_id: str = "") -> str:
    """Return the report as JSON: sorted keys, six significant digits, null where a number is not finite.

    >>> to_json(report=Report((), "accept", 0))
    '{\\n "exit_code": 0,\\n "findings": [],\\n "verdict": "accept"\\n}'
    """
    names = {"patch": patch, "base_id": base_id}
    value = {
        **{k: v for k, v in names.items() if v},
        "verdict": report.verdict,
        "exit_code": report.exit_code,
        "findings": [f._asdict() for f in report.findings],
    }
    return json.dumps(_plain(value), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)


def to_markdown(report: Report, *, patch: str = "") -> str:
    """Return the report as Markdown, for a pull request or a model card.

    >>> to_markdown(Report((), "accept", 0), patch="p").splitlines()[0]
    '## `p`: accept (exit code 0)'
    """
    title = f"`{patch}`" if patch else "Patch"
    lines = [f"## {title}: {report.verdict} (exit code {report.exit_code})", ""]
    lines += ["| check | result | finding |", "|---|---|---|"]
    lines += [f"| {f.name} | {_word(f).strip()} | {_cell(f.summary)} |" for f in report.findings]
    for finding in report.findings:
        if rows := finding.details.get("tests"):
            lines += ["", "| test | n | before | after | negative flips | up to | McNemar p | result |"]
            lines += ["|---|---|---|---|---|---|---|---|"]
            lines += [
                f"| {_cell(r['name'])} | {r['n']} | {r['accuracy_before']:.3f} | {r['accuracy_after']:.3f} "
                f"| {r['negative_flips']} | {r['nfr_upper']:.2%} | {r['mcnemar']:.2g} | {r['status']} |"
                for r in rows
            ]
        if divergence := finding.details.get("kl"):
            lines += ["", "| KL(base‖new) on | measured | jvp estimate |", "|---|---|---|"]
            lines += [
                f"| {_cell(name)} | {kl['measured']:.2e} | {kl['jvp_estimate']:.2e} |"
                for name, kl in divergence.items()
            ]
        if rows := finding.details.get("layers"):
            lines += ["", "| layer | changed | relative norm | share |", "|---|---|---|---|"]
            lines += [
                f"| {_cell(r['layer'])} | {r['changed']} of {r['entries']} | {r['relative_norm']:.3g} "
                f"| {r['share']:.1%} |"
                for r in rows[:20]
            ]
    return "\n".join(lines) + "\n"


def to_junit(report: Report, *, patch: str = "") -> str:
    """Return the report as JUnit XML, one test case a check.

    >>> to_junit(Report((Finding("size", "pass", 0, "", {}),), "accept", 0)).splitlines()[2]
    '  <testcase classname="fishjax.vet" name="size"/>'
    """
    failed = sum(f.exit_code != 0 and f.status != "skip" for f in report.findings)
    skipped = sum(f.status == "skip" for f in report.findings)
    counts = f'tests="{len(report.findings)}" failures="{failed}" skipped="{skipped}"'
    lines = ['<?xml version="1.0" encoding="UTF-8"?>']
    lines.append(f"<testsuite name={quoteattr(_printable(f'fishjax vet {patch}'.strip()))} {counts}>")
    for f in report.findings:
        case = f'  <testcase classname="fishjax.vet" name={quoteattr(f.name)}'
        message = _printable(f.summary)
        if f.status == "skip":
            lines.append(f"{case}><skipped message={quoteattr(message)}/></testcase>")
        elif f.exit_code:
            kind = f'type="exit code {f.exit_code}"'
            lines.append(f"{case}><failure {kind}>{escape(message)}</failure></testcase>")
        else:
            lines.append(f"{case}/>")
    return "\n".join([*lines, "</testsuite>", ""])


def _word(finding: Finding) -> str:
    return "????" if finding.exit_code == 7 else finding.status.upper()


def _extra(finding: Finding) -> list[str]:
    """Return the lines below a finding: where the change sits, and how far the predictions moved."""
    lines = [
        f"KL(base‖new) on {name}: measured {kl['measured']:.2e}, jvp estimate {kl['jvp_estimate']:.2e}"
        for name, kl in finding.details.get("kl", {}).items()
    ]
    for row in finding.details.get("tests", []):
        lines.append(
            f"{row['name']}  {row['accuracy_before']:.3f} -> {row['accuracy_after']:.3f}  (n={row['n']})  "
            f"flips -{row['negative_flips']} +{row['positive_flips']}, at most -{row['nfr_upper']:.2%}  "
            f"McNemar p={row['mcnemar']:.2g}  {row['status'].upper()}"
        )
        lines += [f"  {reason}" for reason in row["reasons"]]
        if row["examples_needed"]:
            lines.append(f"  {row['examples_needed']} examples would be needed")
    lines += [f"claimed but not held: `{name}`" for name in finding.details.get("claimed_not_held", [])]
    layers = finding.details.get("layers", [])[:8]
    width = max((len(row["layer"]) for row in layers), default=0)
    return lines + [
        f"{row['layer']:{width}}  {row['changed'] / row['entries']:7.2%} changed  "
        f"‖Δ‖/‖θ‖ {row['relative_norm']:8.3g}  share {row['share']:4.0%} " + "#" * round(20 * row["share"])
        for row in layers
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _cell(text: str) -> str:
    """Text from a contributor's file must not break out of its cell, nor out of the line."""
    return _printable(" ".join(text.split())).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _printable(text: str) -> str:
    """Names come from a contributor's file: no escape sequence may reach a terminal."""
    return "".join(c for c in text if c.isprintable())

"""The report of an acceptance run, as Markdown and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from figures_report import amount

from acceptance.findings import Findings

Status = Literal["passed", "failed", "skipped"]
_MOST_FIGURES = 4  # of a section in the table; all are below it


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one section: how it ended and why, after how many seconds, and what it had found by then."""

    name: str
    what: str
    status: Status
    why: str
    seconds: float
    findings: Findings

    @property
    def verdict(self) -> str:
        return self.status + _after(self.why)


def judged(code: int | None, findings: Findings, limit: float, last_words: str) -> tuple[Status, str]:
    """How a section ended and why; `code` is its exit code, None when it was stopped after `limit` seconds."""
    broken = [f"{check.name}: {check.detail}" if check.detail else check.name for check in findings.checks
              if not check.holds]
    if code is None:
        broken.append(f"stopped at the end of its time ({limit:.0f} s)")
    elif code < 0:
        broken.append(f"killed by signal {-code}")
    elif code:
        broken.append(f"exit code {code}: {last_words or 'it said nothing'}")
    elif not findings.finished:
        broken.append("it ended before it had said so")
    if broken:
        return "failed", "; ".join(broken)
    if not findings.checks and not findings.figures:
        return "skipped", "; ".join(findings.lacking) or "nothing to look at"
    return "passed", "; ".join(findings.lacking)


def as_json(facts: dict[str, str], results: list[Result], to_come: list[str]) -> dict:
    return {"facts": facts, "unfinished": to_come, "sections": [
        {"name": result.name, "what": result.what, "status": result.status, "why": result.why,
         "seconds": round(result.seconds, 1)} | result.findings.as_dict() for result in results]}


def as_markdown(facts: dict[str, str], results: list[Result], to_come: list[str]) -> str:
    about = "\n".join(f"- {name}: {value}" for name, value in facts.items() if name != "date")
    blocks = [f"# Acceptance, {facts['date']}", about]
    if to_come:
        blocks.append(f"**Unfinished: {', '.join(to_come)} {'is' if len(to_come) == 1 else 'are'} still to come.**")
    blocks.append(table(results))
    for result in results:
        lines = [f"- {'holds' if check.holds else '**does not hold**'}: {check.name}{_after(check.detail)}"
                 for check in result.findings.checks]
        lines += [f"- {figure.name}: {amount(figure.value)} {figure.unit}{_after(figure.notes)}"
                  for figure in result.findings.figures]
        lines += [f"- {note}" for note in result.findings.notes]
        lines += [f"- not looked at: {reason}" for reason in result.findings.lacking or [result.why]
                  * (result.status == "skipped")]
        blocks.append("\n".join([f"## {result.name}: {result.what}", "", *lines]))
    return "\n\n".join(blocks) + "\n"


def table(results: list[Result]) -> str:
    rows = ["| section | result | seconds | key figures |", "| --- | --- | --- | --- |"]
    for result in results:
        verdict = result.verdict.replace("failed", "**failed**", 1) if result.status == "failed" else result.verdict
        cells = [result.name, verdict, f"{result.seconds:.0f}", key_figures(result.findings)]
        rows.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(rows)


def key_figures(findings: Findings) -> str:
    held = sum(check.holds for check in findings.checks)
    words = [f"{held} of {len(findings.checks)} checks hold"] if findings.checks else []
    words += [f"{figure.name} {amount(figure.value)} {figure.unit}" for figure in findings.figures[:_MOST_FIGURES]]
    return "; ".join(words)


def _after(text: str) -> str:
    return f": {text}" if text else ""

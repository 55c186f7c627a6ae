"""Run the long tests (`-m full`) and write their result to docs/records/test-full.md, which is committed.

Usage: python tests/full.py [pytest arguments]
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "records" / "test-full.md"
PACKAGES = ("torch", "transformers", "mlx", "mlx-lm", "jax", "flax")


def cpu_name() -> str:
    """The processor as the kernel names it, with its number of cores."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{names[0].partition(':')[2].strip()}, {len(names)} cores" if names else platform.processor()


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """(passed | failed | skipped, reason)."""
    for tag, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return name, (found.get("message") or "").splitlines()[0][:160]
    return "passed", ""


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        started = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "full",
            f"--junitxml={report}",
            "--timeout=4000",
            *sys.argv[1:],
        ]
        code = subprocess.run(command, cwd=ROOT).returncode
        minutes = (time.monotonic() - started) / 60
        cases = list(ElementTree.parse(report).iter("testcase"))
    rows = [
        (case.get("classname", ""), case.get("name", ""), float(case.get("time", 0)), *outcome(case)) for case in cases
    ]
    counts = {name: sum(row[3] == name for row in rows) for name in ("passed", "failed", "skipped")}
    lines = [
        "# Result of the last `make test-full`",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit `{git('rev-parse', '--short', 'HEAD')}`"
        + (" with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""),
        f"- {cpu_name()}; Python {platform.python_version()}; "
        + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        f"- {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped in {minutes:.1f} minutes",
        "",
        "| test | seconds | result |",
        "| --- | ---: | --- |",
    ]
    for module, name, seconds, result, reason in sorted(rows):
        lines.append(
            f"| `{module.removeprefix('tests.')}::{name}` | {seconds:.0f} | {result}{': ' + reason if reason else ''} |"
        )
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text("\n".join(lines) + "\n")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; written to {RECORD}")
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Known holes in the pinned packages, by pip-audit from the OSV database (https://osv.dev): `python .ci/audit.py FILE URL`.

Ends with 0 where none is known, and where the database cannot be asked: then it was not audited, and a line says so. pip-audit
itself ends with 1 in that case as in the other, and from PyPI's database counts packages that are not found there as fine: so
the database is asked here first, for a hole that it must know, and what pip-audit found is read from its report.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

KNOWN = {"package": {"name": "jinja2", "ecosystem": "PyPI"}, "version": "2.4.1"}
"""Open to CVE-2019-10906 and others, long published."""
PATIENCE = 15
"""Seconds for one answer."""
ACCEPTED: dict[str, str] = {}
"""Holes that do not concern this project, by id, and why not."""


def unreachable(url: str) -> str | None:
    """Why the database cannot be asked, if it cannot."""
    asked = urllib.request.Request(url, json.dumps(KNOWN).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            found = json.load(answer)
    except (
        OSError,
        ValueError,
    ) as error:  # no name, no route, no answer, a status of 4xx or 5xx, a page that is not JSON
        return str(error) or type(error).__name__
    knows = isinstance(found, dict) and found.get("vulns")
    return None if knows else f"it knows of no hole in {KNOWN['package']['name']} {KNOWN['version']}, which has some"


def audited(pins: Path, url: str, report: Path) -> str:
    """Write pip-audit's report, if it gets that far; returns what it said."""
    options = (
        f"--no-deps --disable-pip --strict --vulnerability-service osv --timeout {PATIENCE} --aliases=off --desc=off"
    )
    options += " --progress-spinner=off --format=json"
    files = ["--requirement", str(pins), "--cache-dir", str(report.parent / "cache"), "-o", str(report)]
    ignored = [word for hole in ACCEPTED for word in ("--ignore-vuln", hole)]
    command = [sys.executable, "-m", "pip_audit", *options.split(), "--osv-url", url, *files, *ignored]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def main(pins: Path, url: str) -> int:
    """The exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        reason = unreachable(url)
        said = "" if reason else audited(pins, url, report)
        if not reason and not report.exists():
            reason = unreachable(url)  # it may be gone since
            if not reason:
                print(said, file=sys.stderr)
                print("error: pip-audit ended without a report", file=sys.stderr)
                return 1
        if reason:
            print(f"NOT AUDITED: {url} cannot be asked ({reason}); whether {pins} has known holes is open")
            return 0
        packages = json.loads(report.read_text())["dependencies"]
    holes = [(package, hole) for package in packages for hole in package["vulns"]]
    for package, hole in holes:
        mended = ", ".join(hole["fix_versions"]) or "no version"
        print(f"error: {package['name']} {package['version']}: {hole['id']}, mended in {mended}", file=sys.stderr)
    print(f"audited: {len(packages)} packages of {pins}, {len(holes)} known holes, {len(ACCEPTED)} accepted")
    return 1 if holes or not packages else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2]))

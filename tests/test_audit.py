"""CI's audit is red where a hole is known, and says that it did not take place where the database cannot be asked."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import together

pytest.importorskip("pip_audit", reason="the extra `dev` is not installed")

SCRIPT = Path(__file__).parent.parent / ".ci/audit.py"
PINS = "jinja2==3.1.6\nnumpy==2.4.6\nzipp==4.1.2\n"


def hole(name: str, number: str, fixed: str) -> dict:
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": fixed}]}]
    return {"id": number, "affected": [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": ranges}]}


OLD = {("jinja2", "2.4.1"): [hole("jinja2", "TEST-1", "2.7")]}


@contextmanager
def database(known: dict, *, answers: Callable[[int], int] = lambda n: 200) -> Iterator[str]:
    """OSV's one question, answered from `known`; `answers` gives the status of the n-th answer. Yields its URL."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(query)
            vulns = known.get((query["package"]["name"], query["version"]))
            body = json.dumps({"vulns": vulns} if vulns else {}).encode()
            self.send_response(answers(len(asked)))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Not on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def audit(folder: Path, url: str, pins: str = PINS) -> "subprocess.CompletedProcess[str]":
    (folder / "pins.txt").write_text(pins)
    command = [sys.executable, str(SCRIPT), "pins.txt", url]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_no_known_hole_is_green(tmp_path):
    with database(OLD) as url:
        done = audit(tmp_path, url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "audited: 3 packages of pins.txt, 0 known holes, 0 accepted\n"


def test_a_known_hole_is_red_and_named(tmp_path):
    with database(OLD | {("numpy", "2.4.6"): [hole("numpy", "TEST-2", "2.4.7")]}) as url:
        done = audit(tmp_path, url)
    assert done.returncode == 1
    assert done.stderr == "error: numpy 2.4.6: TEST-2, mended in 2.4.7\n"
    assert "1 known holes" in done.stdout


@pytest.mark.parametrize(
    ("known", "status", "said"),
    [
        (OLD, lambda n: 503, "HTTP Error 503"),
        (OLD, lambda n: 200 if n == 1 else 503, "HTTP Error 503"),  # gone in the middle
        ({}, lambda n: 200, "knows of no hole in jinja2 2.4.1"),  # answers, and knows nothing
    ],
)
def test_a_database_that_does_not_serve_is_no_audit_and_says_so(tmp_path, known, status, said):
    with database(known, answers=status) as url:
        done = audit(tmp_path, url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("NOT AUDITED: ") and said in done.stdout and done.stdout.count("\n") == 1


def test_nobody_there_is_no_audit_and_says_so(tmp_path):
    done = audit(tmp_path, f"http://127.0.0.1:{together.free_port()}/v1/query")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("NOT AUDITED: ") and "Connection refused" in done.stdout


def test_pins_that_can_not_be_read_are_red(tmp_path):
    with database(OLD) as url:
        done = audit(tmp_path, url, pins="numpy>=2\n")
    assert done.returncode == 1 and "error: pip-audit ended without a report" in done.stderr

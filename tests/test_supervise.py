"""Processes that cannot outlive us: real ones, and real SIGKILL."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tasks import supervise
from tasks.servers import free_port
from tasks.stage_process import stage_environment
from tasks.supervise import Child

# a stage with a child of its own, and one in another session, as torchrun starts its workers
FAMILY = """
import subprocess, sys, time
for new in (False, True):
    subprocess.Popen([sys.executable, "-c", "import time; print('born', flush=True); time.sleep(600)"], start_new_session=new)
print("ready", flush=True)
time.sleep(600)
"""
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"


def alive(folder: Path) -> list[psutil.Process]:
    """Every process that bears the folder's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(supervise.MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_gone(folder: Path, seconds: float) -> float:
    started = time.monotonic()
    while alive(folder):
        assert time.monotonic() - started < seconds, f"alive after {seconds} s: {[p.cmdline() for p in alive(folder)]}"
        time.sleep(0.05)
    return time.monotonic() - started


def python(folder: Path, code: str) -> Child:
    return Child([sys.executable, "-u", "-c", code], cwd=folder, env=dict(os.environ))


def test_lines_arrive_as_they_are_printed_and_the_status_is_the_commands(tmp_path):
    code = "import sys; print('told', input()); print('err', file=sys.stderr); print('last', end=''); sys.exit(7)"
    lines: list[str] = []
    assert python(tmp_path, code).run("a word", on_line=lines.append) == 7
    assert lines == ["told a word", "err", "last"]


def test_a_progress_bar_counts_as_its_last_state(tmp_path):
    lines: list[str] = []
    python(tmp_path, r"print('10%\r50%\r100%'); print('done\r')").run("", on_line=lines.append)
    assert lines == ["100%", "done"]


def test_a_stage_draws_no_progress_bars_of_libraries(tmp_path, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    lines: list[str] = []
    command = [
        sys.executable,
        "-c",
        "from transformers.utils.logging import tqdm\nfor _ in tqdm(range(3)): print('told')",
    ]
    Child(command, cwd=tmp_path, env=stage_environment()).run("", on_line=lines.append)
    assert lines == ["told"] * 3


def test_a_command_killed_by_a_signal_says_which(tmp_path):
    assert python(tmp_path, "import os; os.kill(os.getpid(), 9)").run("", on_line=print) == 128 + 9


INTERRUPTED = """
import os, runpy, sys, threading
wait = threading.Condition.wait
def interrupted(self, timeout=None):  # the lock is held here, as it is for moments in every wait
    if timeout:
        os.kill(os.getpid(), 15)
    return wait(self, timeout)
threading.Condition.wait = interrupted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_supervisor_ends_at_whatever_moment_it_is_told_to():
    command = [sys.executable, "-uc", "print('ready'); import time; time.sleep(600)"]
    supervisor = [sys.executable, "-c", INTERRUPTED, supervise.__file__, *command]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(supervisor, **pipes, start_new_session=True)  # it ends its whole group
    try:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
    finally:
        for each in [*psutil.Process(process.pid).children(), process] if process.poll() is None else []:
            each.kill()
        process.communicate()


def test_what_a_command_leaves_behind_ends_with_it(tmp_path):
    code = FAMILY.rsplit("time.sleep", 1)[0]
    assert python(tmp_path, code).run("", on_line=print) == 0
    assert not alive(tmp_path)


def test_ticks_come_while_the_command_is_silent(tmp_path):
    ticks: list[float] = []
    python(tmp_path, "import time; time.sleep(2)").run(
        "", on_line=print, on_tick=lambda: ticks.append(time.monotonic())
    )
    assert len(ticks) >= 3


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt, SystemExit])
def test_whatever_is_raised_in_us_nothing_is_left_running(tmp_path, error):
    def raise_it(line: str) -> None:
        if line == "ready":
            raise error

    with pytest.raises(error):
        python(tmp_path, FAMILY).run("", on_line=raise_it)
    assert not alive(tmp_path)


def test_another_thread_can_end_it(tmp_path):
    def stop(line: str) -> None:
        if line == "ready":
            threading.Thread(target=supervise.stop_all).start()

    assert python(tmp_path, FAMILY).run("", on_line=stop) == 128 + signal.SIGTERM
    assert not alive(tmp_path)


def test_one_that_ignores_term_is_killed_after_the_grace(tmp_path):
    def stop(line: str) -> None:
        if line == "ready":
            supervise.stop_all()

    started = time.monotonic()
    python(tmp_path, STUBBORN).run("", on_line=stop)
    assert 10 < time.monotonic() - started < 15
    assert not alive(tmp_path)


@pytest.mark.parametrize(("seconds", "written"), [("1", False), ("8", True)])
def test_the_environment_says_how_long_a_stage_may_take_to_end(tmp_path, monkeypatch, seconds, written):
    monkeypatch.setenv("LONGLORA_GRACE", seconds)
    code = """
import signal, sys, time
def end(*_):
    time.sleep(2.5)
    open("checkpoint", "w").close()
    sys.exit(143)
signal.signal(15, end); print('ready', flush=True); time.sleep(600)
"""

    def stop(line: str) -> None:
        if line == "ready":
            supervise.stop_all()
            supervise.stop_all()  # a second Ctrl-C does not shorten it

    python(tmp_path, code).run("", on_line=stop)
    assert (tmp_path / "checkpoint").exists() == written
    assert not alive(tmp_path)


@pytest.mark.parametrize("said", ["0", "-1", "2.5", "soon", ""])
def test_seconds_that_can_not_be_are_refused(monkeypatch, said):
    monkeypatch.setenv("LONGLORA_GRACE", said)
    with pytest.raises(ValueError, match=f"^LONGLORA_GRACE={said}: must be whole seconds from 1 on"):
        supervise.grace()


PARENT = """
import os, sys
from pathlib import Path
from tasks.supervise import Child
child = Child([sys.executable, "-u", "-c", sys.argv[2]], cwd=Path(sys.argv[1]), env=dict(os.environ))
child.run("", on_line=lambda line: print(line, flush=True))
"""


@pytest.fixture
def parent(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), FAMILY], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    # Also that its children are born: one that has yet to say so dies by itself when nobody reads any more.
    said = ""
    while said.count("born") < 2 or "ready" not in said:
        said += process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    supervise.sweep(tmp_path)


def test_sigkill_of_the_parent_ends_the_whole_family(tmp_path, parent):
    assert len(alive(tmp_path)) == 4  # supervisor, command, its two children
    parent.kill()
    assert wait_until_gone(tmp_path, 5) < 5


def test_sigkill_of_the_supervisor_ends_the_whole_family(tmp_path, parent):
    supervisor = next(p for p in alive(tmp_path) if p.ppid() == parent.pid)
    supervisor.kill()
    wait_until_gone(tmp_path, 5)
    assert parent.wait(5) == 0  # the parent itself lives on, and comes to its end


def test_sigkill_of_both_leaves_what_sweep_finds(tmp_path, parent):
    supervisor = next(p for p in alive(tmp_path) if p.ppid() == parent.pid)
    parent.send_signal(signal.SIGSTOP)  # so that it cannot clean up
    supervisor.kill()
    parent.kill()
    psutil.wait_procs([supervisor, psutil.Process(parent.pid)], timeout=5)  # or one that is dying is counted
    orphans = {process.pid for process in alive(tmp_path)}
    assert len(orphans) == 3  # the command and its two children
    assert set(supervise.sweep(tmp_path)) == orphans
    assert not alive(tmp_path)


SAVING = """
import signal, sys, time
def end(*_):
    time.sleep(3)
    open("checkpoint", "w").close()
    sys.exit(143)
signal.signal(15, end); print("ready", flush=True); time.sleep(600)
"""


@pytest.mark.parametrize(("grace", "saved"), [("20", True), ("1", False)])
def test_the_next_run_waits_for_a_stage_that_is_still_saving_as_long_as_it_may(
    tmp_path, monkeypatch, capsys, grace, saved
):
    monkeypatch.setenv("LONGLORA_GRACE", grace)
    flow = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), SAVING], stdout=subprocess.PIPE, text=True)
    assert flow.stdout and flow.stdout.readline() == "ready\n"
    flow.kill()
    flow.wait()
    supervise.take_over(tmp_path)
    assert not alive(tmp_path)
    assert (tmp_path / "checkpoint").exists() == saved
    assert capsys.readouterr().out == "waiting: a stage of this run is still ending, from the time before\n"


def test_a_supervisor_that_does_not_end_is_not_waited_for_for_ever(tmp_path, monkeypatch, parent):
    monkeypatch.setattr(supervise, "grace", lambda: -4)  # one second in all
    supervise.take_over(tmp_path)  # its parent lives
    assert not alive(tmp_path)


def test_sweep_spares_other_folders(tmp_path, parent):
    assert supervise.sweep(tmp_path / "another") == []
    assert len(alive(tmp_path)) == 4


ORPHAN = """
import subprocess, sys
command = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True).pid)
"""


def test_who_stands_in_no_tree_is_found_by_the_supervisors_name_and_who_has_gone_meanwhile_lives_no_more():
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], env={**os.environ, supervise.OWN: "ours"}, stdout=subprocess.PIPE, text=True
    )
    process = psutil.Process(int(done.stdout))
    try:
        assert process not in psutil.Process().children(recursive=True)
        assert process in supervise.descendants("ours")
        assert process not in supervise.descendants("another's")
        assert supervise.lives(process)
    finally:
        process.kill()
        psutil.wait_procs([process], timeout=5)
    assert not supervise.lives(process)


WORKER = """
import os, signal, sys, time
if os.fork() == 0:  # a daemon: nobody's child, in a session of its own, and deaf
    os.setsid()
    if os.fork() == 0:
        signal.signal(15, signal.SIG_IGN)
        time.sleep(600)
    os._exit(0)
rank = os.environ["RANK"]
def end(*_):
    time.sleep(1)
    open("saved" + rank, "w").close()
    sys.exit(143)
signal.signal(15, end if rank == "0" else signal.SIG_IGN)  # the other hangs in a kernel, say
os.write(1, b"born, alone in its session: %r\\n" % (os.getsid(0) == os.getpid()))  # whole: the other writes there too
time.sleep(600)
"""


def test_torchruns_workers_save_and_then_nothing_of_them_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGLORA_GRACE", "4")
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command = [*torchrun, f"--master-port={free_port()}", "worker.py"]
    said = []

    def hear(line: str) -> None:
        said.append(line)
        if said.count("born, alone in its session: True") == 2:
            supervise.stop_all()  # what a cancel comes to

    child = Child(command, cwd=tmp_path, env=stage_environment())
    assert child.run("", on_line=hear) == 128 + signal.SIGTERM, said
    assert [file.name for file in tmp_path.glob("saved*")] == ["saved0"]
    assert not alive(tmp_path)


SRUN = """#!{python}
import signal, subprocess, sys
task = subprocess.Popen([{python!r}, "-u", *sys.argv[1:]], start_new_session=True)  # as Slurm's daemon does, which is no child
def forcing_termination(*_):
    task.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, forcing_termination)
sys.exit(task.wait())
"""
TASK = """
import signal, sys, time
def end(*_):
    time.sleep(0.5)
    open("saved", "w").close()
    sys.exit(143)
signal.signal(15, end)
print("ready")
time.sleep(600)
"""


def test_the_tasks_of_slurms_srun_save_though_it_kills_them_when_it_is_told_to_end(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o700)
    (tmp_path / "task.py").write_text(TASK)
    child = Child(["sh", "-c", f"{srun} task.py; true"], cwd=tmp_path, env=stage_environment())
    hear = {"ready": supervise.stop_all}
    child.run("", on_line=lambda line: hear[line]())
    assert (tmp_path / "saved").exists()
    assert not alive(tmp_path)


ELSEWHERE = """#!{python}
import os, signal, sys, time
def forcing_termination(*_):
    time.sleep(0.5)  # it asks Slurm's daemon on the other node
    os.kill(int(sys.argv[1]), signal.SIGKILL)
    sys.exit(1)
signal.signal(signal.SIGTERM, forcing_termination)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("beside", "grace", "least", "most"), [("", 60, 0, 30), ("sleep 600 & ", 2, 2, 32)])
def test_what_srun_started_on_other_nodes_does_not_outlive_it(tmp_path, monkeypatch, beside, grace, least, most):
    """At once where nobody on this node would save; else after the grace, in which the others end or hang."""
    monkeypatch.setenv("LONGLORA_GRACE", str(grace))
    srun = tmp_path / "srun"
    srun.write_text(ELSEWHERE.format(python=sys.executable))
    srun.chmod(0o700)
    task = subprocess.Popen(["sleep", "600"], start_new_session=True)  # no child of srun's, and without our name
    try:
        child = Child(["sh", "-c", f"{beside}{srun} {task.pid}; true"], cwd=tmp_path, env=stage_environment())
        told: list[float] = []

        def hear(line: str) -> None:
            told.append(time.monotonic())
            supervise.stop_all()

        child.run("", on_line=hear)
        assert task.wait(timeout=5) == -signal.SIGKILL
        assert least <= time.monotonic() - told[0] < most
        assert not alive(tmp_path)
    finally:
        task.kill()
        task.wait()

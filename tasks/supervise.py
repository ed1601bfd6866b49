"""One child process that cannot outlive us.

A `Child` is this file run as a supervisor, in a session of its own; the supervisor starts the command. Our death, however it comes,
closes the pipe that is the supervisor's stdin: then it ends the command and all that the command started, first kindly (TERM),
then not (KILL). A signal aimed at us, a time-out raised in us and the end of the command take the same way out.
Every process of a run carries its folder in an environment variable, so that `sweep` finds even those whose supervisor was killed,
and its supervisor's name in another: a process whose parent ends just now stands in no tree.
"""

import contextlib
import ctypes
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

GRACE = "LONGLORA_GRACE"
MARK = "LONGLORA_WORKTREE"
OWN = "LONGLORA_SUPERVISOR"
TICK = 0.5  # seconds: how soon a time-out or a cancel is noticed
SRUN = 2.0  # seconds that Slurm's srun has to end its tasks; with the last KILL less than the five that `close` waits

running: set["Child"] = set()  # for `stop_all`
interrupted = False  # this process was told to end: nothing is to be started any more


def grace() -> int:
    """Seconds between TERM and KILL, by LONGLORA_GRACE: training ends after the step it is at, with a checkpoint.

    Raises:
        ValueError: that is no number from 1 on.
    """
    said = os.environ.get(GRACE, "10")
    if not said.isdecimal() or int(said) < 1:
        raise ValueError(f"{GRACE}={said}: must be whole seconds from 1 on, such as 240")
    return int(said)


class Child:
    """A supervised command, started at once; it may wait for a line on its stdin before it does its work."""

    def __init__(
        self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], handles: Sequence[int] = ()
    ) -> None:
        """`handles`: open files that the supervisor has too, until nothing of the command is left."""
        self.cwd = cwd
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *command],
            cwd=cwd,
            env={**env, MARK: str(cwd)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=handles,
        )
        running.add(self)

    def run(self, line: str, *, on_line: Callable[[str], None], on_tick: Callable[[], None] = lambda: None) -> int:
        """Tell the command `line`, and follow it to its end: what it prints goes to `on_line`, line by line.

        `on_tick` is called about twice a second. Returns the exit status (128 + n where signal n ended it). Whatever is raised
        here, nothing of the command is left running.
        """
        assert self.process.stdin
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended already: its output and status say why
                self.process.stdin.write(line.encode() + b"\n")
                self.process.stdin.flush()
            follow(self.process, on_line, on_tick)
            status = self.process.wait()
            return 128 - status if status < 0 else status
        finally:
            self.close()

    def close(self) -> None:
        """End the command and all it started; returns when they are gone."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # the supervisor's sign
        try:
            self.process.wait(timeout=grace() + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.returncode == -signal.SIGKILL:  # the supervisor itself was killed
            sweep(self.cwd)
        self.process.stdout.close()
        running.discard(self)


def follow(process: "subprocess.Popen[bytes]", on_line: Callable[[str], None], on_tick: Callable[[], None]) -> None:
    """Read until the command's output ends or the supervisor does; a progress bar (\\r) counts as its last state."""
    assert process.stdout
    pipe, rest = process.stdout.fileno(), b""
    os.set_blocking(pipe, False)
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        due = time.monotonic()
        while True:
            ended = process.poll() is not None
            chunk = os.read(pipe, 1 << 16) if selector.select(0 if ended else TICK) else None
            if chunk == b"" or (ended and chunk is None):
                break
            *lines, rest = (rest + (chunk or b"")).split(b"\n")
            for line in lines:
                on_line(visible(line))
            if time.monotonic() >= due:
                on_tick()
                due = time.monotonic() + TICK
    if rest.strip():
        on_line(visible(rest))


def visible(line: bytes) -> str:
    """What a terminal would show at the end of `line`."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").rstrip()


def stop_all() -> None:
    """End every command that another thread of ours follows: its `run` returns."""
    for child in list(running):
        child.process.terminate()


def interrupt() -> None:
    """For a signal handler: end what runs. An exception alone is not enough, for who is interrupted may swallow it."""
    global interrupted
    interrupted = True
    stop_all()


def sweep(folder: Path) -> list[int]:
    """Kill what an earlier run in `folder` left behind; the ids. Only safe for the holder of the run's lock."""
    found = marked(folder)
    for process in found:
        tell(process, signal.SIGKILL)
    psutil.wait_procs(found, timeout=5)
    return [process.pid for process in found]


def take_over(folder: Path) -> None:
    """See to it that nothing of an earlier run in `folder` is at work. Only safe for the holder of the run's lock.

    A supervisor whose run was killed is ending its stage, which may be saving: it has its grace. What is left then is killed.
    """
    ending = [process for process in marked(folder) if is_supervisor(process)]
    if psutil.wait_procs(ending, timeout=1)[1]:
        print("waiting: a stage of this run is still ending, from the time before", flush=True)
        psutil.wait_procs(ending, timeout=grace() + 5)
    sweep(folder)


def marked(folder: Path) -> list[psutil.Process]:
    """Every process that bears the mark of `folder`, but this one."""
    return bearing(MARK, str(folder))


def bearing(variable: str, value: str) -> list[psutil.Process]:
    """Every process that has this in its environment, but this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def is_supervisor(process: psutil.Process) -> bool:
    """Whether it is this file, as a `Child` runs it; not its command, which has the same words behind."""
    try:
        return process.cmdline()[1:2] == [str(Path(__file__))]
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


# --- the supervisor's side


def supervise(command: Sequence[str]) -> int:
    """Be the parent of `command`; return its exit status. TERM, INT, or the end of stdin end it early (status 143)."""
    adopt_orphans()
    # an Event's lock would be held for ever by what the handler interrupts, if that is `wait`
    stop: queue.SimpleQueue[None] = queue.SimpleQueue()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.put(None)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    own = f"{os.getpid()} {time.time_ns()}"
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, OWN: own})
    assert child.stdin
    to_child = child.stdin

    def pass_on() -> None:
        with contextlib.suppress(BrokenPipeError):
            # empty when the last writer is gone: our parent has died, or wants us to end
            while line := os.read(0, 1024):
                to_child.write(line)
                to_child.flush()
        stop.put(None)

    def wait_for_child() -> None:
        child.wait()
        stop.put(None)

    for wait in (pass_on, wait_for_child):
        threading.Thread(target=wait, daemon=True).start()
    stop.get()
    status = child.poll()
    end(own)
    if status is None:
        return 128 + signal.SIGTERM
    return 128 - status if status < 0 else status


def adopt_orphans() -> None:
    """On Linux, become the parent of descendants whose own parent dies, so that none can hide."""
    if sys.platform == "linux":
        set_child_subreaper = 36  # prctl(2)
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def descendants(own: str) -> list[psutil.Process]:
    """Our children and theirs (torchrun gives its workers sessions of their own), and whoever else is in our group or bears our
    name: the tree is read process by process, and who loses his parent meanwhile is not in it."""
    ours = psutil.Process().children(recursive=True)
    known = {process.pid for process in ours} | {os.getpid()}
    ours += [process for process in bearing(OWN, own) if process.pid not in known]
    known |= {process.pid for process in ours}
    for pid in psutil.pids():
        try:
            if pid not in known and os.getpgid(pid) == os.getpgid(0):
                ours.append(psutil.Process(pid))
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            continue
    return ours


def end(own: str) -> None:
    """TERM, a grace, KILL; again for those that appeared meanwhile.

    Slurm's srun answers TERM with KILL for its tasks on all nodes, so it is told last. Those on this node bear our name, and end
    by themselves; a training stops on the others with them, and then srun ends. But told it must be, before KILL: it cannot pass
    that on, and what it started on other nodes would outlive it.
    """
    processes = descendants(own)
    spared = {process for process in processes if is_srun(process)}
    if not has_tasks(spared, processes):
        spared.clear()  # nobody here would save: srun has nothing to wait for
    for process in processes:
        if process not in spared:
            tell(process, signal.SIGTERM)
    psutil.wait_procs(processes, timeout=grace())
    late = [process for process in descendants(own) if is_srun(process)]
    for process in late:
        tell(process, signal.SIGTERM)
    psutil.wait_procs(late, timeout=SRUN)
    while left := [process for process in descendants(own) if lives(process)]:
        for process in left:
            tell(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)


def is_srun(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() == "srun"
    return False


def has_tasks(sruns: set[psutil.Process], processes: Sequence[psutil.Process]) -> bool:
    """Whether one of `processes` is neither an srun nor above one: what srun started on this node, for all we know."""
    chain = set(sruns)
    for process in sruns:
        with contextlib.suppress(psutil.NoSuchProcess):
            chain.update(process.parents())
    return not chain.issuperset(processes)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # since it was found
        return False


def tell(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))

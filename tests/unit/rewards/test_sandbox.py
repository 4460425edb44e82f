"""Hostile programs in the sandbox: each tries what it must not, and the machine is looked at afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rewards import PluginError
from rewards.sandbox import Calls, Limits, Outcome, Sandbox, UnusableTests, client
from tests.unit.rewards import hostile
from tests.unit.rewards.hostile import FORGERIES, SECRET

ROOT = Path(__file__).parents[3]
SHORT = Limits(cpu_s=1, wall_s=2.5)
SHORTER = Limits(cpu_s=1, wall_s=1.2)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="code runs on Linux only")


class Runner:
    """A sandbox with an event loop, for tests that are plain functions."""

    def __init__(self) -> None:
        self.loop = asyncio.Runner()
        self.sandbox = Sandbox()
        self.loop.run(self.sandbox.start())

    def script(self, source: str, text: str = "", limits: Limits = SHORT) -> tuple[str, Outcome]:
        return self.loop.run(self.sandbox.run_script(source, text, limits))

    def tests(self, solution: str, *tests: str, limits: Limits = SHORT, **more: object) -> Outcome:
        return self.loop.run(self.sandbox.run_tests(solution, Calls(tests, **more), limits))

    def processes(self) -> list[psutil.Process]:
        """What is left below the zygote."""
        assert self.sandbox._process is not None
        deadline = time.monotonic() + 2
        while (left := psutil.Process(self.sandbox._process.pid).children(recursive=True)) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.01)
        return left


@pytest.fixture(scope="module")
def box() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.sandbox.close()
    runner.loop.close()


@pytest.fixture(autouse=True)
def nothing_left(box: Runner) -> Iterator[None]:
    yield
    assert box.processes() == []
    assert box.script("print(6 * 7)") == ("42\n", Outcome(1, 1))


# ------------------------------------------------------------------------------------------------ outside

PRELUDE = """
import os, sys, socket, ctypes, signal
def attempt(name, function):
    try:
        function()
    except BaseException:
        return
    print("LEAK", name)
"""


def attempts(**lines: str) -> str:
    return PRELUDE + "".join(f"attempt({name!r}, lambda: {line})\n" for name, line in lines.items())


def leaks(box: Runner, source: str, count: int) -> None:
    """Nothing of `source` works in the sandbox, and everything does outside: the attempts are real ones."""
    outside = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=20, cwd="/")
    assert outside.stdout.count("LEAK") == count, outside.stdout + outside.stderr
    assert box.script(source) == ("", Outcome(1, 1))


def test_no_file_outside_can_be_read(box: Runner, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    tmp_path.chmod(0o755)
    secret.chmod(0o644)
    lines = {
        "passwd": "open('/etc/passwd').read()",
        "run folder": f"open({str(secret)!r}).read()",
        "seen": f"os.stat({str(secret)!r})",
        "checkout": f"os.listdir({str(ROOT)!r})",
        "environment": f"open('/proc/{os.getpid()}/environ').read()",
        "own environment": "open('/proc/self/environ').read()",
        "memory": "open('/proc/self/mem', 'rb')",
        "mounts": "open('/proc/mounts').read()",
        "devices": "os.listdir('/sys/class')",
        "parent's root": f"open('/proc/{os.getpid()}/root/etc/passwd').read()",
        "climbing": "open('../../../../../../etc/passwd').read()",
    }
    leaks(box, attempts(**lines), len(lines))


def test_a_descriptor_that_was_left_open_leads_nowhere(box: Runner) -> None:
    printed, outcome = box.script(
        "import os\nfor d in range(3, 4096):\n    try: print(d, os.fstat(d))\n    except OSError: pass"
    )
    assert not outcome.cause
    assert [line.split()[0] for line in printed.splitlines()] == ["3"], "its program came over 3"
    found = box.script(
        "import os\nprint(sorted(os.listdir('/')), os.listdir('.'), dict(os.environ), os.uname().nodename)"
    )
    top = {"lib", "lib64", "usr", "dev", "etc", "work", Path(os.__file__).parts[1]}
    assert set(eval(found[0].split("]")[0] + "]")) <= top
    assert "[] {'HOME': '/work', 'TMPDIR': '/work', 'LANG': 'C.UTF-8'} sandbox" in found[0]


def test_nothing_outside_can_be_written(box: Runner, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "link").symlink_to("/tmp")
    home = os.path.expanduser("~")
    places = ["/tmp", "/dev/shm", home, str(tmp_path), "/var/tmp", f"/proc/{os.getpid()}/cwd"]
    lines = {f"write {p}": f"(open('{p}/align-trial', 'w').close(), os.remove('{p}/align-trial'))" for p in places}
    lines |= {f"folder {p}": f"(os.mkdir('{p}/align-trial-d'), os.rmdir('{p}/align-trial-d'))" for p in places}
    lines |= {"chmod": f"os.chmod({str(tmp_path)!r}, 0o777)", "times": f"os.utime({str(tmp_path)!r})"}
    leaks(box, attempts(**lines), len(lines))
    lines = {"root": "open('/trial', 'w')", "library": "open(os.__file__ + '.trial', 'w')",
             "patch": "open(os.__file__, 'a')", "devices": "open('/dev/trial', 'w')"}  # fmt: skip
    assert box.script(attempts(**lines)) == ("", Outcome(1, 1))


def test_its_own_folder_is_writable_small_and_gone_afterwards(box: Runner) -> None:
    assert box.script("open('a', 'w').write('x')\nprint(open('a').read())")[0] == "x\n"
    assert box.script("import os\nprint(os.listdir('.'))")[0] == "[]\n"
    assert 1 <= int(box.script(hostile.FILL)[0]) <= 16
    assert int(box.script(hostile.MANY_FILES)[0]) < 1024


def test_there_is_no_network(box: Runner, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as path,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
    ):
        path.bind(str(tmp_path / "s"))
        (tmp_path / "s").chmod(0o777)
        name, bell = f"\0align-test-{os.getpid()}", f"\0align-bell-{os.getpid()}"
        abstract.bind(name)
        datagrams.bind(bell)
        udp.bind(("127.0.0.1", 0))
        for listening in (path, abstract):
            listening.listen()
        lines = {
            "tcp": f"socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}), 1)",
            "udp": f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', {udp.getsockname()!r})",
            "path": f"socket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r})",
            "abstract": f"socket.socket(socket.AF_UNIX).connect({name!r})",
            "pair": f"socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', {bell!r})",
            "names": "socket.getaddrinfo('localhost', 80)",
            "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
            "listening": "socket.create_server(('127.0.0.1', 0))",
        }
        leaks(box, attempts(**lines), len(lines))
        for listening in (tcp, path, abstract):
            assert arrived(listening.accept, listening) == 1, "the one from outside"
        for listening in (udp, datagrams):
            assert arrived(lambda s=listening: s.recv(9), listening) == 1
        extra = {"names": "socket.gethostbyname('example.com')", "raw": "socket.socket(40, socket.SOCK_STREAM)"}
        assert box.script(attempts(**extra)) == ("", Outcome(1, 1))


def arrived(take: Callable[[], object], listening: socket.socket) -> int:
    listening.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            take()
            count += 1
    return count


def test_no_other_process_gets_a_signal(box: Runner) -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    lines = {
        "kill": f"os.kill({victim.pid}, 0)", "group": f"os.killpg({victim.pid}, 0)",
        "pidfd": f"signal.pidfd_send_signal(os.pidfd_open({victim.pid}), 0)",
        "own group": "os.killpg(0, 0)", "all": "os.kill(-1, 0)",
        "queue": f"1 / (ctypes.CDLL(None).sigqueue({victim.pid}, 0, None) + 1)",
        "owner": "__import__('fcntl').fcntl(os.pipe()[0], 8, os.getpid())",
        "priority": f"os.setpriority(os.PRIO_PROCESS, {victim.pid}, os.getpriority(os.PRIO_PROCESS, {victim.pid}))",
        "limits": f"__import__('resource').prlimit({victim.pid}, 7)",
    }  # fmt: skip
    try:
        leaks(box, attempts(**lines), len(lines))
        assert box.script(hostile.KILL_ALL)[0] == "done\n"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


CALLS = {
    "io_uring": 425, "bpf": 321, "perf": 298, "ptrace": 101, "keyring": 250, "add key": 248, "unshare": 272,
    "setns": 308, "mount": 165, "new mount": 429, "pivot": 155, "chroot": 161, "process memory": 310, "memfd": 319,
    "userfault": 323, "shm": 29, "message queue": 68, "inotify": 253, "personality": 135, "prctl": 157, "seccomp": 317,
    "landlock": 444, "pidfd": 434, "handle": 304, "swap": 167, "reboot": 169, "module": 175, "clock": 227, "fork": 57,
    "vfork": 58, "exec": 59, "execveat": 322, "socket": 41, "connect": 42, "sendmsg": 46, "kcmp": 312, "ioperm": 173,
    "syslog": 103, "fanotify": 300, "future": 600,
}  # fmt: skip


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86-64")
def test_calls_that_no_solution_needs_are_refused_by_number(box: Runner) -> None:
    source = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {CALLS!r}.items():\n"
        "    if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1: print(name)\n"
        "print(libc.syscall(56, 17, 0, 0, 0, 0), libc.syscall(56, 0x10010011, 0, 0, 0, 0))"
    )
    assert box.script(source)[0] == "-1 -1\n", "clone as fork and clone into a namespace too"


# ------------------------------------------------------------------------------------------------ resources


def test_a_fork_bomb_forks_nothing(box: Runner) -> None:
    assert box.script(hostile.FORK_BOMB) == ("", Outcome(1, 1))
    assert box.processes() == []


def test_a_daemon_cannot_stay(box: Runner) -> None:
    assert box.script(hostile.DAEMON)[1] == Outcome(1, 1)
    assert box.processes() == []


def test_threads_are_few(box: Runner) -> None:
    assert 8 <= int(box.script(hostile.THREADS)[0]) <= 17


@pytest.mark.parametrize(
    "how", ["bytearray(10 * 2**30)", "[0] * (10 * 2**30 // 8)", "__import__('mmap').mmap(-1, 10 * 2**30)"]
)
def test_ten_gigabytes_are_not_there(box: Runner, how: str) -> None:
    before = psutil.virtual_memory().available
    _, outcome = box.script(how)
    assert outcome.cause == "failed" and ("MemoryError" in outcome.detail or "allocate" in outcome.detail)
    assert psutil.virtual_memory().available > before - 2**30


def test_memory_that_grows_ends_the_solution_and_nothing_else(box: Runner) -> None:
    # Time enough to reach the limit of memory: writing to so many fresh pages took a busy machine a second of its CPU.
    grows = "def f():\n    x = []\n    while True: x.append(bytearray(2**20))"
    outcome = box.tests(grows, "assert f() == 1", limits=replace(SHORT, cpu_s=20.0, wall_s=60.0))
    assert outcome.cause in ("failed", "crashed") and outcome.passed == 0


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("while True: pass", "timeout"),
        ("import time\nwhile True: time.sleep(1000)", "timeout"),
        ("import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')", "timeout"),
        (hostile.DEAF, "timeout"),
        ("while True: print('x' * 10000)", "output"),
        ("import os\nos._exit(7)", "crashed"),
        ("import ctypes\nctypes.string_at(0)", "crashed"),
        ("import os\nos.abort()", "crashed"),
        ("1 / 0", "failed"),
        ("exit(3)", "failed"),
        ("def f(:", "failed"),
    ],
)  # fmt: skip
def test_a_program_that_goes_wrong_is_ended_and_its_end_is_named(box: Runner, source: str, cause: str) -> None:
    started = time.monotonic()
    _, outcome = box.script(source)
    assert (outcome.passed, outcome.cause) == (0, cause), outcome
    assert time.monotonic() - started < 8


def test_many_at_once_do_not_disturb_each_other(box: Runner) -> None:
    async def all_at_once() -> list[tuple[str, Outcome]]:
        runs = [box.sandbox.run_script(f"print({n})\nopen('f', 'x')", "", Limits()) for n in range(24)]
        return list(await asyncio.gather(*runs))

    found = box.loop.run(all_at_once())
    assert [printed for printed, _ in found] == [f"{n}\n" for n in range(24)]
    assert {outcome for _, outcome in found} == {Outcome(1, 1)}


def test_a_run_that_is_given_up_leaves_no_process(box: Runner) -> None:
    async def give_up() -> None:
        task = asyncio.create_task(box.sandbox.run_script("while True: pass", "", Limits()))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    box.loop.run(give_up())
    assert box.processes() == []


def test_one_solution_leaves_nothing_for_the_next(box: Runner) -> None:
    first = "import json, builtins, random\njson.loads = builtins.len = None\nrandom.seed(5)\nprint(1)"
    box.script(first)
    source = "import json, random\nprint(json.loads('[1]'), len('ab'), random.random())"
    assert box.script(source) == box.script(source)
    assert box.script(source)[0].startswith("[1] 2 ")


# ------------------------------------------------------------------------------------------------ the verdict


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(box: Runner, name: str) -> None:
    # The second assertion would accept anything that is true, the third anything iterable.
    outcome = box.tests(
        FORGERIES[name], f"got = f(1)\nassert got == {SECRET!r}\nassert list(got) == list({SECRET!r})", limits=SHORTER
    )
    assert outcome.passed == 0 and outcome.cause, outcome
    fraction = box.tests(
        FORGERIES[name], f"assert f(1) == {SECRET!r}\nassert f(1) in [{SECRET!r}, 5]", fraction=True, limits=SHORTER
    )
    assert fraction.passed == 0 and fraction.total >= 2, fraction


def test_an_honest_solution_passes_the_same_tests(box: Runner) -> None:
    honest = f"def f(x): return {SECRET!r}"
    assert box.tests(honest, f"got = f(1)\nassert got == {SECRET!r}\nassert list(got) == list({SECRET!r})") == Outcome(
        3 - 1, 2
    )


VALUES = [
    "None", "True", "-3", "2**200", "1.5", "float('inf')", "1+2j", "'é\\ud800'", "b'\\x00\\xff'", "[1, [2]]",
    "(1, (2,))", "{1: 'a', (2, 3): None}", "{1, 2}", "frozenset([1])", "__import__('fractions').Fraction(1, 3)",
    "__import__('decimal').Decimal('1.10')", "__import__('collections').Counter('aab')",
    "__import__('collections').deque([1, 2])", "__import__('datetime').date(2024, 5, 6)", "10**5000",
]  # fmt: skip


def test_values_cross_unchanged_in_both_directions(box: Runner) -> None:
    tests = [f"assert f({v}) == {v} and type(f({v})) is type({v})" for v in VALUES]
    assert box.tests("def f(x): return x", *tests) == Outcome(len(VALUES), len(VALUES))


def test_objects_functions_generators_and_changed_arguments_work_across(box: Runner) -> None:
    solution = """
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def total(self): return self.a + self.b
def longest(pairs): return max(p.total() for p in pairs)
def count(n):
    yield from range(n)
def sort(xs): xs.sort()
def apply(f, x): return f(x)
def twice(f): return lambda x: f(f(x))
def bad(x): raise ValueError("no " + x)
class Solution:
    def add(self, a, b): return a + b
LIMIT = 5
"""
    tests = [
        "assert longest([Pair(1, 2), Pair(5, 7)]) == 12 and Pair(3, 4).a == 3",
        "assert list(count(4)) == [0, 1, 2, 3] and next(count(1)) == 0",
        "xs = [3, 1, 2]\nsort(xs)\nassert xs == [1, 2, 3]",
        "assert apply(lambda v: v + 1, 4) == 5 and apply(len, 'abc') == 3 and twice(lambda v: v * 2)(3) == 12",
        "try:\n    bad('way')\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'no way'",
        "assert Solution().add(1, b=2) == 3 and LIMIT == 5 and math.floor(2.5) == 2",
        "assert Pair(1, 2) != Pair(1, 2) and Pair(1, 2) != 3",
    ]
    found = box.tests(solution, *tests)
    assert found.cause == "" and found.passed == found.total, found


def test_a_fraction_counts_assertions_and_goes_on_after_a_failure(box: Runner) -> None:
    lines = ["def check(c):", "assert c(1) == 1", "assert c(2) == 5, 'two'", "assert c(3) == 3", "assert c(4) == 4"]
    check = "\n    ".join(lines) + "\ncheck(f)"
    assert box.tests("def f(x): return x", check) == Outcome(
        0, 4, "failed", "AssertionError: two (line 3): assert c(2) == 5, 'two'"
    )
    found = box.tests("def f(x): return x", check, fraction=True)
    assert (found.passed, found.total, found.cause) == (3, 4, "failed")
    found = box.tests("def f(x):\n    while x == 3: pass\n    return x", check, fraction=True)
    assert (found.passed, found.total, found.cause) == (1, 4, "timeout")


def test_tests_that_cannot_judge_are_an_error_and_no_score(box: Runner) -> None:
    for tests, setup in (
        ("assert f(", ""),
        ("f(1)", ""),
        ("assert abs(-1) == 1", ""),
        ("assert f(1)", "import nothing_of_that_name"),
    ):
        with pytest.raises(UnusableTests):
            box.tests("def f(x): return x", tests, setup=setup)


def test_tests_that_reach_no_assertion_have_not_passed(box: Runner) -> None:
    for fraction in (False, True):
        outcome = box.tests("def f(x): return []", "for x in f(1):\n    assert x == 1", fraction=fraction)
        assert (outcome.passed, outcome.detail) == (0, "no assertion was reached")


def test_what_the_row_defines_is_not_the_solutions_to_replace(box: Runner) -> None:
    forged = "def helper(x): return 0\ndef f(x): return 99\nabs = lambda x: 0"
    test = "assert abs(helper(f(1))) == 0"
    assert box.tests(forged, test).cause == "", "a helper of the solution's is its word"
    found = box.tests(forged, test, setup="def helper(x): return x - 1\ndef f(x): ...", entry="f")
    assert found.cause == "failed", "a helper of the row's is the row's, the entry the solution's"


# ------------------------------------------------------------------------------------------------ refusal


@pytest.mark.parametrize("layer", ["privileges", "limits", "system calls"])
def test_it_does_not_start_where_a_layer_does_not_hold(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hole = (
        "; from dataclasses import replace; from rewards.sandbox import jail; "
        f"jail.INNER = tuple(replace(l, enter=lambda limits: None) if l.name == {layer!r} else l for l in jail.INNER)"
    )
    monkeypatch.setattr(client, "_BOOTSTRAP", client._BOOTSTRAP.replace("; from", hole + "; from", 1))
    with pytest.raises(PluginError, match=f"{layer}: Leak") as caught:
        asyncio.run(Sandbox().start())
    assert caught.value.remedy


@pytest.mark.parametrize("flag", ["NEWPID", "NEWNET", "NEWNS"])
def test_it_does_not_start_where_a_namespace_is_missing(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hole = f"; from rewards.sandbox import jail, kernel; jail._OTHERS &= ~kernel.CLONE_{flag}"
    monkeypatch.setattr(client, "_BOOTSTRAP", client._BOOTSTRAP.replace("; from", hole + "; from", 1))
    with pytest.raises(PluginError, match="contained here"):
        asyncio.run(Sandbox().start())


IN_A_CONTAINER = """
import struct, sys
from pathlib import Path
from rewards import PluginError, Sample
from rewards.plugin import PluginSpec
from rewards.pool import RewardPool
from rewards.sandbox import kernel
number = {"x86_64": 272, "aarch64": 97}[kernel.MACHINE]
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
kernel._call("prctl", 38, 1, 0, 0, 0)
kernel.install_filter(b"".join(struct.pack("=HBBI", *i) for i in code))
try:
    with RewardPool([PluginSpec("code")], Path("/"), 0) as pool:
        pool.score_sync([Sample("print(1)", row={"input_output": {"inputs": [""], "outputs": ["1"]}})])
except PluginError as error:
    print(error)
"""


def test_where_unshare_is_forbidden_as_containers_do_the_plugin_refuses_with_a_remedy() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_CONTAINER], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "code cannot be contained here: namespaces:" in done.stdout, done.stdout + done.stderr
    assert "seccomp=unconfined" in done.stdout


AS_ANOTHER_USER = """
import asyncio, os, sys
from rewards.sandbox import Calls, Limits, Sandbox
async def main():
    async with Sandbox() as box:
        print(await box.run_script("print(6 * 7)", "", Limits()))
        print(await box.run_tests("def f(x): return x", Calls(["assert f(3) == 3"]), Limits()))
asyncio.run(main())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as such a user already")
@pytest.mark.parametrize("who", ["a user without privileges", "root without the right to mount"])
def test_it_needs_no_privilege(who: str) -> None:
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
    if python is None or shutil.which("setpriv") is None or not _is_recent(python):
        pytest.skip("no interpreter that another user may start")
    change = ["--reuid=1234", "--regid=1234", "--clear-groups"] if "user" in who else ["--bounding-set=-sys_admin"]
    command = ["setpriv", *change, python, "-c", AS_ANOTHER_USER]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the test run's own may be closed to other users
        Path(folder).chmod(0o755)
        shutil.copytree(ROOT / "rewards", Path(folder) / "rewards")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert "('42\\n', Outcome(passed=1, total=1" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("passed=1, total=1") == 2


def _is_recent(python: str) -> bool:
    asked = subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"])
    return asked.returncode == 0


def test_everything_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    source = (
        "import asyncio\nfrom rewards.sandbox import Sandbox, Limits\n"
        "async def main():\n    s = Sandbox()\n    await s.start()\n    print(s._process.pid, flush=True)\n"
        "    await s.run_script('import time\\ntime.sleep(50)', '', Limits(wall_s=60))\nasyncio.run(main())"
    )
    parent = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    zygote = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 10
    while len(family := [zygote, *zygote.children(recursive=True)]) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert len(gone) == 3 and not alive


def test_a_zygote_that_was_killed_is_an_error_and_the_next_start_mends_it() -> None:
    async def main() -> None:
        async with Sandbox() as sandbox:
            assert sandbox._process is not None
            sandbox._process.kill()
            sandbox._process.wait()
            with pytest.raises(client.SandboxError):
                await sandbox.run_script("print(1)", "", Limits())
            await sandbox.start()
            assert (await sandbox.run_script("print(1)", "", Limits()))[0] == "1\n"

    asyncio.run(main())

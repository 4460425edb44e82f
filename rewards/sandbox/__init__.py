"""Runs Python that a policy wrote and nobody has read, and judges it by tests.

    client.py   the caller's side: starts the zygote, asks for processes, reads the verdict
    zygote.py   a fork server that knows no secret, and the keeper of each process
    jail.py     the layers that contain a process, each with a trial; seccomp.py the filter of system calls
    roles.py    what runs inside; peer.py the values that pass between two sandboxes; kernel.py system calls

**It is contained or it does not run.** At every start a process enters the layers one by one and tries what each of
them forbids: to see processes and files, to write, to connect, to mount, to allocate, to fork, to signal. One success,
or one layer that this kernel does not give, and `Sandbox.start` raises PluginError. There is no way around it: a
process that could not enter a layer ends before it has read a byte of the solution.

**A verdict cannot be forged.** Whatever shares a process with the solution belongs to the solution: it may exit with
any status, print any token, patch the checker, read any secret in memory. So nothing of the judgement shares its
process. The tests run in a second sandbox, and a name of the solution is there a `Remote`: a call sends the arguments
and gets plain data back, built by the tests' own interpreter from JSON. What compares, counts and asserts never runs
the solution's code; expected values never leave the tests' sandbox; the verdict goes over a connection that the
solution's process does not hold, and says "passed" only after the last line of the tests. What is left to a solution
is to return what the tests expect. A program that reads and prints is judged by the caller, from what it printed.
Beside what it returns, tests believe a solution in one thing: helpers that only the solution defines. The row's own
prompt and set-up are run on the tests' side for this reason, and the standard library's modules are imported there.

**Nothing passes from one solution to the next.** Each process has namespaces, a folder and limits made for it, and is
gone with all of them before the verdict is given. All are forked from a zygote that only passes connections on, unread:
its memory is the same before every solution. It has no environment of ours and no open file.

Limits of the guarantee: the kernel itself (a hole in it is a hole here), what can be measured of the machine (time, the
number of cores), and one process's share of CPU and memory for its seconds.
"""

from rewards.sandbox.client import Calls, Outcome, Sandbox, SandboxError, UnusableTests
from rewards.sandbox.jail import Limits

__all__ = ["Calls", "Limits", "Outcome", "Sandbox", "SandboxError", "UnusableTests"]

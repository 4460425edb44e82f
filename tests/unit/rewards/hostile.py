"""Programs that want out, want more than their share, or want a verdict that they have not earned."""

import secrets

SECRET = "q7fX0" + secrets.token_hex(3)
"""What `f(1)` should return in the tests of the forgeries: only the tests know it. A forgery knows how it begins."""

_FOUND = """
import re
def found(data):
    if type(data) is str: data = data.encode("utf8", "replace")
    hit = re.search(bytes([113, 55, 102, 88, 48]) + b"[0-9a-f]{6}", data)
    return hit and hit[0].decode()
"""

FORGERIES = {
    "exits with 0": "import sys\nsys.exit(0)",
    "exits hard with 0": "import os\nos._exit(0)",
    "exits when called": "import os\ndef f(x): os._exit(0)",
    "raises SystemExit": "def f(x): raise SystemExit(0)",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "raises AssertionError": "def f(x): raise AssertionError",
    "equals everything": """
class A:
    def __eq__(self, other): return True
    def __bool__(self): return True
def f(x): return A()
""",
    "an int that equals everything": """
class A(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return A(1)
""",
    "a text that equals everything": """
class A(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(x): return A("no")
""",
    "prints a pass": "print('passed', 'OK', '1 passed')\ndef f(x): return None",
    "writes a verdict everywhere": """
import json, os
verdict = json.dumps({"passed": 2, "total": 2, "failure": "", "cause": "", "bad": ""}).encode()
def f(x):
    for descriptor in range(64):
        try: os.write(descriptor, verdict)
        except OSError: pass
""",
    "closes the channel": "import os\nos.closerange(0, 64)\ndef f(x): return None",
    "patches the protocol": """
import rewards.sandbox.peer as peer
peer.Peer.encode = lambda self, value: {"t": "builtin", "v": "True"}
def f(x): return None
""",
    "patches the judge": """
import builtins, json
import rewards.sandbox.roles as roles
roles._run = roles._judge = lambda *a, **k: {"passed": 2, "total": 2}
builtins.AssertionError = Exception
json.dumps = lambda *a, **k: '["got", {"passed": 2}]'
def f(x): return None
""",
    "answers with a bomb": """
import os, struct
def f(x):
    bomb = b"[" * (4 * 2**20 - 8)
    bomb = struct.pack("!I", len(bomb)) + bomb
    while bomb: bomb = bomb[os.write(3, bomb):]
    os._exit(0)
""",
    "answers without end": "import os\ndef f(x):\n    while True: os.write(3, b'\\xff' * 65536)",
    "asks without end": """
import os, struct
def f(x):
    ask = b'["ask","call",0,[],{"t":"dict","v":[]}]'
    while True:
        os.write(3, struct.pack("!I", len(ask)) + ask)
        os.read(3, 1 << 16)
""",
    "looks into the tests": _FOUND
    + """
import json, os, struct
def f(x):
    for number in range(-3, 5):
        for name in ("__globals__", "__self__", "__dict__"):
            ask = json.dumps(["ask", "attribute", number, name]).encode()
            os.write(3, struct.pack("!I", len(ask)) + ask)
            if hit := found(os.read(3, 1 << 16)): return hit
""",
    "searches its memory": _FOUND
    + """
import gc, sys
def f(x):
    for thing in [*gc.get_objects(), *sys.modules.values()]:
        parts = thing.values() if type(thing) is dict else thing if isinstance(thing, (list, tuple, set)) else ()
        for text in [thing, *parts]:
            if type(text) in (str, bytes) and (hit := found(text)): return hit
""",
    "reads its memory": _FOUND
    + """
import ctypes, io
def f(x):
    start = id(io) & ~0xfff
    for page in range(start, start + 2**26, 4096):
        if hit := found(ctypes.string_at(page, 4096)): return hit
""",
    "walks the stack": _FOUND
    + """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if isinstance(value, str) and (hit := found(value)): return hit
        frame = frame.f_back
""",
    "yields for ever": "import itertools\ndef f(x): return itertools.repeat('q')",
}

FORK_BOMB = """
import ctypes, multiprocessing, os, subprocess, sys
def run(start):
    try:
        start()
        print("LEAK", start)
    except BaseException:
        pass
def system():
    if os.system("true") != 0: raise OSError
def vfork():
    if ctypes.CDLL(None).vfork() == -1: raise OSError
for start in (os.fork, os.forkpty, lambda: os.posix_spawn("/bin/sh", ["sh"], {}), lambda: subprocess.run(["true"]),
              lambda: subprocess.run([sys.executable, "-c", ""]), multiprocessing.Process(target=print).start,
              lambda: os.execv(sys.executable, ["x"]), system, vfork):
    for _ in range(50): run(start)
"""

DAEMON = """
import os, threading, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(60)
except OSError:
    pass
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""

THREADS = """
import threading
count, wait = 0, threading.Event()
try:
    while count < 500:
        threading.Thread(target=wait.wait, daemon=True).start()
        count += 1
except RuntimeError:
    pass
print(count)
"""

FILL = """
count = 0
try:
    while count < 200:
        open(str(count), "wb").write(bytes(2**20))
        count += 1
except OSError:
    pass
print(count)
"""

MANY_FILES = """
count = 0
try:
    while count < 100000:
        open(f"f{count}", "w").close()
        count += 1
except OSError:
    pass
print(count)
"""

KILL_ALL = """
import os
for pid in [-1, 0, *range(2, 70000)]:
    try: os.kill(pid, 9)
    except OSError: pass
print("done")
"""

DEAF = """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""

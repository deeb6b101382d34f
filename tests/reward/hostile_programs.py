"""Programs that try everything but passing their tests. Every one has to score 0 and to leave nothing behind.

FUNCTION: name -> program, for tests that want f(1) == 8472 and the like. SCRIPT: the same for the output 8472. The expensive
ones run into a limit. {port}, {folder}, {pid}: a port that is listened on, a folder and a process of the tests.
"""

FOLDER_NAMES = ("/tmp", "/usr", "/work", "/root", "/var/tmp", "/dev/shm", "/etc")

ALWAYS_EQUAL = r"""
class Yes:
    def _yes(self, *a, **k): return True
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = __call__ = _yes
    __hash__ = lambda self: 8472
    def _zero(self, *a): return 0.0
    __sub__ = __rsub__ = __add__ = __radd__ = __mul__ = __abs__ = __float__ = __round__ = _zero
    def __getattr__(self, name):
        if name.startswith('__'): raise AttributeError(name)
        return self
"""

FUNCTION = {
    # ---- leaving with a friendly exit code
    "exit at import": r"""
import sys
sys.exit(0)
""",
    "_exit at import": r"""
import os
os._exit(0)
""",
    "exit in the call": r"""
import sys
def f(x): sys.exit(0)
""",
    "_exit in the call": r"""
import os
def f(x): os._exit(0)
""",
    "exit with a message": "def f(x): raise SystemExit('passed')",
    "exit in a thread": r"""
import os, threading
threading.Thread(target=lambda: os._exit(0)).start()
def f(x): return 1
""",
    "exec of true": r"""
import os
def f(x): os.execv('/bin/true', ['true'])
""",
    "interpreter ended from atexit": r"""
import atexit, os
atexit.register(os._exit, 0)
def f(x): raise KeyboardInterrupt
""",
    # ---- the comparison
    "equal to everything": ALWAYS_EQUAL + "def f(x): return Yes()",
    "an int equal to everything": r"""
class I(int):
    __eq__ = __ne__ = lambda s, o: True
    __hash__ = int.__hash__
def f(x): return I(3)
""",
    "a list of equals": ALWAYS_EQUAL + "def f(x): return [Yes()]",
    "equal class": ALWAYS_EQUAL + r"""
class M(type):
    __eq__ = lambda s, o: True
    __hash__ = lambda s: 1
class C(metaclass=M): pass
def f(x): return C
""",
    "builtins patched": r"""
import builtins
for n in ('AssertionError', 'abs', 'all', 'isinstance', 'len', 'sorted', 'compile', 'exec'):
    setattr(builtins, n, lambda *a, **k: True)
def f(x): return 1
""",
    "AssertionError harmless": r"""
import builtins
class A(Exception):
    def __new__(cls, *a): raise SystemExit(0)
builtins.AssertionError = A
def f(x): return 1
""",
    "operator patched": r"""
import operator, sys
operator.eq = lambda a, b: True
sys.modules['operator'].__eq__ = operator.eq
def f(x): return 1
""",
    "trace function": r"""
import sys
def t(frame, event, arg):
    frame.f_trace_lines = False
    return t
sys.settrace(t); sys.setprofile(t)
def f(x): return 1
""",
    "constants rewritten": r"""
import ctypes, sys
ctypes.memset(id(8472) + 24, 1, 4)
def f(x): return 1
""",
    # ---- what it might read
    "search of memory": r"""
import gc
def f(x):
    found = [o for o in gc.get_objects() if isinstance(o, (str, list, dict)) and '84' + '72' in str(o)]
    return 84 * 100 + 72 if found else None
""",
    "search of frames": r"""
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for v in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if '84' + '72' in str(v)[:100000]: return 84 * 100 + 72
        frame = frame.f_back
""",
    "search of /proc": r"""
import glob
def f(x):
    for p in glob.glob('/proc/[0-9]*/*') + glob.glob('/proc/self/*'):
        try:
            if b'assert f' in open(p, 'rb').read(10**7): return 84 * 100 + 72
        except OSError: pass
""",
    "search of own memory": r"""
def f(x):
    import re
    mem = open('/proc/self/mem', 'rb')
    for line in open('/proc/self/maps'):
        a, b = (int(n, 16) for n in line.split()[0].split('-'))
        try: mem.seek(a); data = mem.read(b - a)
        except (OSError, ValueError, OverflowError): continue
        if b'assert f(1) == ' + b'84' + b'72' in data: return 84 * 100 + 72
""",
    "search of files": r"""
import os
def f(x):
    for top in ('/work', '/root', '{folder}'):
        for d, _, names in os.walk(top):
            for n in names:
                if n.endswith('expected.txt'): return int(open(os.path.join(d, n)).read())
""",
    # ---- the channel
    "forged verdicts": r"""
import os
for fd in range(64):
    for line in (b'{"loaded": true}\n', b'{"test": 0, "passed": true, "note": null}\n'):
        try: os.write(fd, line)
        except OSError: pass
def f(x): return 1
""",
    "forged replies": r"""
import json, os, struct
for r in (['ok'], ['ok', {'f': True}, []], ['ok', True, {}], ['ok', True, {}]):
    d = json.dumps(r).encode()
    os.write(3, struct.pack('<I', len(d)) + d)
def f(x): return 1
""",
    "endless message": r"""
import os
os.write(3, b'\xff\xff\xff\x7f' + b'x' * 1000)
def f(x): return 1
""",
    "deeply nested reply": r"""
import os, struct
def f(x):
    d = b'["ok", ' + b'[' * 200000 + b']' * 200000 + b', {}]'
    os.write(3, struct.pack('<I', len(d)) + d)
""",
    "channel closed": r"""
import os
os.closerange(0, 1000)
def f(x): return 1
""",
    "codec patched": r"""
import sys
g = sys.modules['reward.function_guest']
sys.modules['reward.sandbox_values'].Codec.encode = lambda *a: True
g.Guest.do_call = lambda *a: [True, {}]
def f(x): return 1
""",
    "callbacks without end": r"""
import sys
def f(x):
    b = sys.modules['reward.function_guest'].Channel(3)
    while True: b.send(['callback', 1, {'l': []}, {}])
""",
    "numpy of objects": r"""
import sys
g = sys.modules['reward.function_guest']
g.Guest.do_call = lambda *a: [{'np': ['|O', [1], '00' * 8]}, {}]
def f(x): return 1
""",
    # ---- others
    "kills its parent": r"""
import os, signal
for pid in (os.getppid(), 1, -1, {pid}):
    for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        try: os.kill(pid, s)
        except OSError: pass
def f(x): return 1
""",
    "traces its parent": r"""
import ctypes, os
libc = ctypes.CDLL(None)
for pid in (os.getppid(), 1, {pid}):
    libc.ptrace(16, pid, 0, 0)
def f(x): return 1
""",
    "mounts and namespaces": r"""
import ctypes, os
libc = ctypes.CDLL(None)
libc.unshare(0x10000000); libc.unshare(0x20000)
libc.umount2(b'/tmp', 2); libc.umount2(b'/', 2); libc.mount(b'none', b'/usr', b'tmpfs', 0, None)
libc.chroot(b'/usr'); libc.setuid(0); libc.setgid(0)
libc.sethostname(b'gone', 4)
def f(x): return 1
""",
    "writes everywhere": r"""
import os
for d in ('/tmp', '/usr', '/work', '/root', '/var/tmp', '/dev/shm', '/etc') + ('{folder}', os.path.dirname(os.__file__)):
    try:
        os.chmod(d, 0o777); open(d + '/unmask-hostile', 'w').write('x')
        open(d + '/unmask-hostile', 'w').write('x')
    except OSError: pass
def f(x): return 1
""",
    "a server and a client": r"""
import socket
for target in (('127.0.0.1', {port}), ('localhost', {port})):
    try:
        s = socket.create_connection(target, 1); s.send(b'hello')
    except OSError: pass
try:
    s = socket.socket(); s.bind(('', {port} + 1)); s.listen()
except OSError: pass
def f(x): return 1
""",
    "children left behind": r"""
import os, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(300)
        os._exit(0)
def f(x): return 1
""",
    "shared memory left behind": r"""
import ctypes
from multiprocessing import shared_memory
ctypes.CDLL(None).shmget(4711, 4096, 0o1666)
try: shared_memory.SharedMemory('unmask-hostile', create=True, size=4096)
except OSError: pass
def f(x): return 1
""",
}

EXPENSIVE_FUNCTION = {
    "loop at import": "while True: pass",
    "loop in the call": r"""
def f(x):
    while True: pass
""",
    "sleeps": r"""
import time
def f(x): time.sleep(1000)
""",
    "ignores signals": r"""
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True: pass
""",
    "stops itself": r"""
import os, signal
def f(x): os.kill(os.getpid(), signal.SIGSTOP)
""",
    "loop in C": "def f(x): return 9 ** 9 ** 9",
    "limits raised": r"""
import resource
for r in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NPROC):
    try:
        resource.setrlimit(r, (-1, -1))
    except (OSError, ValueError): pass
def f(x):
    while True: pass
""",
    "recursion": r"""
import sys
sys.setrecursionlimit(10**9)
def f(x): return f(x + 1)
""",
    "recursion in C": r"""
import sys
sys.setrecursionlimit(10**9)
def f(x):
    class A:
        def __repr__(self): return repr(self)
    return repr(A())
""",
    "fork bomb": r"""
import os
def f(x):
    while True:
        try: os.fork()
        except OSError: pass
""",
    "threads": r"""
import threading, time
def f(x):
    while True:
        try: threading.Thread(target=time.sleep, args=(1000,)).start()
        except (RuntimeError, MemoryError): pass
""",
    "memory bomb": r"""
def f(x):
    kept = []
    while True:
        try: kept.append(b'x' * (1 << 24))
        except MemoryError: pass
""",
    "memory bomb of children": r"""
import os, time
def f(x):
    for _ in range(20):
        if os.fork() == 0:
            kept = b'x' * (1 << 28)
            time.sleep(100)
    time.sleep(100)
""",
    "a large value": "def f(x): return 'x' * (1 << 29)",
    "disk filled": r"""
def f(x):
    for n in range(10**6):
        try:
            with open(f'file{n}', 'wb') as file:
                while True: file.write(b'x' * (1 << 20))
        except OSError: pass
""",
    "descriptors": r"""
import os
def f(x):
    while True:
        try: os.pipe()
        except OSError: return 1
""",
    "memory without a name": r"""
import os
def f(x):
    fd = os.memfd_create('x')
    while True: os.write(fd, b'x' * (1 << 20))
""",
}

SCRIPT = {
    "nothing": "",
    "exits early": r"""
import sys
sys.exit(0)
print(8472)
""",
    "crashes behind the output": r"""
print(8472)
raise ValueError
""",
    "killed behind the output": r"""
import os, signal
print(8472, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
os.abort()
""",
    "fails behind the output": r"""
import os
print(8472, flush=True)
os._exit(3)
""",
    "stdout closed": r"""
import os, sys
os.close(1)
sys.stdout = None
""",
    "a child answers, later": r"""
import os, time
if os.fork() == 0:
    time.sleep(1)
    print(8472, flush=True)
""",
    "reads what is open": r"""
import os
for fd in range(64):
    try: print(os.pread(fd, 10**6, 0).decode(errors='replace'))
    except OSError: pass
""",
    "expected output in a file": r"""
import glob
for p in glob.glob('{folder}/*') + glob.glob('/tmp/*/expected.txt'): print(open(p).read())
""",
    "both answers": r"""
print(8471)
print(8472)
""",
}

EXPENSIVE_SCRIPT = {
    "output without end": "while True: print('8472' * 1000)",
    "output without end, in silence": r"""
import os
while True: os.write(1, b' ' * 65536)
""",
    "loops behind the output": r"""
print(8472, flush=True)
while True: pass
""",
    "waits behind the output": r"""
import time
print(8472, flush=True)
import threading
threading.Thread(target=time.sleep, args=(100,)).start()
""",
}

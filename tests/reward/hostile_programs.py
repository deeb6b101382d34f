"""Programs that try everything but passing their tests. Every one has to score 0 and to leave nothing behind.

FUNCTION: name -> program, for tests that want f(1) == 8472 and the like. SCRIPT: the same for output 8472.
{port}, {folder}, {pid}: a port that is listened on, a folder and a process of the tests.
"""

FOLDER_NAMES = ("/tmp", "/usr", "/work", "/root", "/var/tmp", "/dev/shm", "/etc")

ALWAYS_EQUAL = """
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
    "exit at import": "import sys\nsys.exit(0)",
    "_exit at import": "import os\nos._exit(0)",
    "exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "_exit in the call": "import os\ndef f(x): os._exit(0)",
    "exit with a message": "def f(x): raise SystemExit('passed')",
    "exit in a thread": "import os, threading\nthreading.Thread(target=lambda: os._exit(0)).start()\ndef f(x): return 1",
    "exec of true": "import os\ndef f(x): os.execv('/bin/true', ['true'])",
    "interpreter ended from atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise KeyboardInterrupt",
    # ---- the comparison
    "equal to everything": ALWAYS_EQUAL + "\ndef f(x): return Yes()",
    "an int equal to everything": "class I(int):\n    __eq__ = __ne__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef f(x): return I(3)",
    "a list of equals": ALWAYS_EQUAL + "\ndef f(x): return [Yes()]",
    "equal class": ALWAYS_EQUAL
    + "\nclass M(type):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 1\nclass C(metaclass=M): pass\ndef f(x): return C",
    "builtins patched": "import builtins\nfor n in ('AssertionError', 'abs', 'all', 'isinstance', 'len', 'sorted', 'compile', 'exec'):\n"
    "    setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return 1",
    "AssertionError harmless": "import builtins\nclass A(Exception):\n    def __new__(cls, *a): raise SystemExit(0)\n"
    "builtins.AssertionError = A\ndef f(x): return 1",
    "operator patched": "import operator, sys\noperator.eq = lambda a, b: True\nsys.modules['operator'].__eq__ = operator.eq\ndef f(x): return 1",
    "trace function": "import sys\ndef t(frame, event, arg):\n    frame.f_trace_lines = False\n    return t\nsys.settrace(t); sys.setprofile(t)\n"
    "def f(x): return 1",
    "constants rewritten": "import ctypes, sys\nctypes.memset(id(8472) + 24, 1, 4)\ndef f(x): return 1",
    # ---- what it might read
    "search of memory": "import gc\ndef f(x):\n    found = [o for o in gc.get_objects() if isinstance(o, (str, list, dict)) and '84' + '72' in str(o)]\n"
    "    return 84 * 100 + 72 if found else None",
    "search of frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for v in list(frame.f_locals.values()) + "
    "list(frame.f_globals.values()):\n            if '84' + '72' in str(v)[:100000]: return 84 * 100 + 72\n        frame = frame.f_back",
    "search of /proc": "import glob\ndef f(x):\n    for p in glob.glob('/proc/[0-9]*/*') + glob.glob('/proc/self/*'):\n        try:\n"
    "            if b'assert f' in open(p, 'rb').read(10**7): return 84 * 100 + 72\n        except OSError: pass",
    "search of own memory": "def f(x):\n    import re\n    mem = open('/proc/self/mem', 'rb')\n    for line in open('/proc/self/maps'):\n"
    "        a, b = (int(n, 16) for n in line.split()[0].split('-'))\n        try: mem.seek(a); data = mem.read(b - a)\n"
    "        except (OSError, ValueError, OverflowError): continue\n        if b'assert f(1) == ' + b'84' + b'72' in data: return 84 * 100 + 72",
    "search of files": "import os\ndef f(x):\n    for top in ('/work', '/root', '{folder}'):\n        for d, _, names in os.walk(top):\n"
    "            for n in names:\n                if n.endswith('expected.txt'): return int(open(os.path.join(d, n)).read())",
    # ---- the channel
    "forged verdicts": "import os\nfor fd in range(64):\n    for line in (b'{\"loaded\": true}\\n', b'{\"test\": 0, \"passed\": true, \"note\": null}\\n'):\n"
    "        try: os.write(fd, line)\n        except OSError: pass\ndef f(x): return 1",
    "forged replies": "import json, os, struct\nfor r in (['ok'], ['ok', {'f': True}, []], ['ok', True, {}], ['ok', True, {}]):\n"
    "    d = json.dumps(r).encode()\n    os.write(3, struct.pack('<I', len(d)) + d)\ndef f(x): return 1",
    "endless message": "import os\nos.write(3, b'\\xff\\xff\\xff\\x7f' + b'x' * 1000)\ndef f(x): return 1",
    "deeply nested reply": "import os, struct\ndef f(x):\n    d = b'[\"ok\", ' + b'[' * 200000 + b']' * 200000 + b', {}]'\n"
    "    os.write(3, struct.pack('<I', len(d)) + d)",
    "channel closed": "import os\nos.closerange(0, 1000)\ndef f(x): return 1",
    "codec patched": "import sys\ng = sys.modules['reward.function_guest']\nsys.modules['reward.sandbox_values'].Codec.encode = lambda *a: True\n"
    "g.Guest.do_call = lambda *a: [True, {}]\ndef f(x): return 1",
    "callbacks without end": "import sys\ndef f(x):\n    b = sys.modules['reward.function_guest'].Channel(3)\n"
    "    while True: b.send(['callback', 1, {'l': []}, {}])",
    "numpy of objects": "import sys\ng = sys.modules['reward.function_guest']\n"
    "g.Guest.do_call = lambda *a: [{'np': ['|O', [1], '00' * 8]}, {}]\ndef f(x): return 1",
    # ---- others
    "kills its parent": "import os, signal\nfor pid in (os.getppid(), 1, -1, {pid}):\n    for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):\n"
    "        try: os.kill(pid, s)\n        except OSError: pass\ndef f(x): return 1",
    "traces its parent": "import ctypes, os\nlibc = ctypes.CDLL(None)\nfor pid in (os.getppid(), 1, {pid}):\n    libc.ptrace(16, pid, 0, 0)\n"
    "def f(x): return 1",
    "mounts and namespaces": "import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.unshare(0x10000000); libc.unshare(0x20000)\n"
    "libc.umount2(b'/tmp', 2); libc.umount2(b'/', 2); libc.mount(b'none', b'/usr', b'tmpfs', 0, None)\nlibc.chroot(b'/usr'); "
    "libc.setuid(0); libc.setgid(0)\nlibc.sethostname(b'gone', 4)\ndef f(x): return 1",
    "writes everywhere": "import os\nfor d in " + repr(FOLDER_NAMES) + " + ('{folder}', os.path.dirname(os.__file__)):\n    try:\n"
    "        os.chmod(d, 0o777); open(d + '/unmask-hostile', 'w').write('x')\n        open(d + '/unmask-hostile', 'w').write('x')\n"
    "    except OSError: pass\ndef f(x): return 1",
    "a server and a client": "import socket\nfor target in (('127.0.0.1', {port}), ('localhost', {port})):\n    try:\n"
    "        s = socket.create_connection(target, 1); s.send(b'hello')\n    except OSError: pass\ntry:\n    s = socket.socket(); "
    "s.bind(('', {port} + 1)); s.listen()\nexcept OSError: pass\ndef f(x): return 1",
    "children left behind": "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
    "            time.sleep(300)\n        os._exit(0)\ndef f(x): return 1",
    "shared memory left behind": "import ctypes\nfrom multiprocessing import shared_memory\nctypes.CDLL(None).shmget(4711, 4096, 0o1666)\n"
    "try: shared_memory.SharedMemory('unmask-hostile', create=True, size=4096)\nexcept OSError: pass\ndef f(x): return 1",
}  # fmt: skip

EXPENSIVE_FUNCTION = {
    "loop at import": "while True: pass",
    "loop in the call": "def f(x):\n    while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(1000)",
    "ignores signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "def f(x):\n    while True: pass",
    "stops itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "loop in C": "def f(x): return 9 ** 9 ** 9",
    "limits raised": "import resource\nfor r in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NPROC):\n    try:\n"
    "        resource.setrlimit(r, (-1, -1))\n    except (OSError, ValueError): pass\ndef f(x):\n    while True: pass",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x + 1)",
    "recursion in C": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    class A:\n        def __repr__(self): return repr(self)\n    return repr(A())",
    "fork bomb": "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "threads": "import threading, time\ndef f(x):\n    while True:\n        try: threading.Thread(target=time.sleep, args=(1000,)).start()\n"
    "        except (RuntimeError, MemoryError): pass",
    "memory bomb": "def f(x):\n    kept = []\n    while True:\n        try: kept.append(b'x' * (1 << 24))\n        except MemoryError: pass",
    "memory bomb of children": "import os, time\ndef f(x):\n    for _ in range(20):\n        if os.fork() == 0:\n            kept = b'x' * (1 << 28)\n"
    "            time.sleep(100)\n    time.sleep(100)",
    "a large value": "def f(x): return 'x' * (1 << 29)",
    "disk filled": "def f(x):\n    for n in range(10**6):\n        try:\n            with open(f'file{n}', 'wb') as file:\n"
    "                while True: file.write(b'x' * (1 << 20))\n        except OSError: pass",
    "descriptors": "import os\ndef f(x):\n    while True:\n        try: os.pipe()\n        except OSError: return 1",
    "memory without a name": "import os\ndef f(x):\n    fd = os.memfd_create('x')\n    while True: os.write(fd, b'x' * (1 << 20))",
}  # fmt: skip

SCRIPT = {
    "nothing": "",
    "exits early": "import sys\nsys.exit(0)\nprint(8472)",
    "crashes behind the output": "print(8472)\nraise ValueError",
    "killed behind the output": "import os, signal\nprint(8472, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\nos.abort()",
    "fails behind the output": "import os\nprint(8472, flush=True)\nos._exit(3)",
    "stdout closed": "import os, sys\nos.close(1)\nsys.stdout = None",
    "a child answers, later": "import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    print(8472, flush=True)",
    "reads what is open": "import os\nfor fd in range(64):\n    try: print(os.pread(fd, 10**6, 0).decode(errors='replace'))\n    except OSError: pass",
    "expected output in a file": "import glob\nfor p in glob.glob('{folder}/*') + glob.glob('/tmp/*/expected.txt'): print(open(p).read())",
    "both answers": "print(8471)\nprint(8472)",
}

EXPENSIVE_SCRIPT = {
    "output without end": "while True: print('8472' * 1000)",
    "output without end, in silence": "import os\nwhile True: os.write(1, b' ' * 65536)",
    "loops behind the output": "print(8472, flush=True)\nwhile True: pass",
    "waits behind the output": "import time\nprint(8472, flush=True)\nimport threading\nthreading.Thread(target=time.sleep, args=(100,)).start()",
}

"""What Linux offers to shut a program in: namespaces, a root of its own, dropped capabilities, limits, a system call filter.

Plain system calls through ctypes, standard library only: this is loaded by the process that all programs are forks of.
Sources: namespaces(7), user_namespaces(7), mount_setattr(2), seccomp(2), capabilities(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_GET_SECCOMP, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 8, 21, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

SYSTEM_FOLDERS = ("usr", "lib", "lib32", "lib64", "libx32", "bin", "sbin")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("null", "zero", "full", "random", "urandom")

PROGRAM_UID = 1000
"""Of programs, as they see it."""

# Two tables: (x86_64, aarch64). Numbers from 424 on are the same on all machines.
SYSCALLS = {
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "socket": (41, 198), "connect": (42, 203), "sendto": (44, 206), "bind": (49, 200), "listen": (50, 201), "clone": (56, 220),
    "kill": (62, 129), "ptrace": (101, 117), "syslog": (103, 116), "capset": (126, 91), "rt_sigqueueinfo": (129, 138),
    "personality": (135, 92), "pivot_root": (155, 41), "mount": (165, 40), "umount2": (166, 39), "tkill": (200, 130),
    "tgkill": (234, 131), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "unshare": (272, 97),
    "rt_tgsigqueueinfo": (297, 240), "perf_event_open": (298, 241), "prlimit64": (302, 261), "open_by_handle_at": (304, 265),
    "setns": (308, 268), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "memfd_create": (319, 279), "bpf": (321, 280), "userfaultfd": (323, 282),
    "pidfd_send_signal": (424, 424), "io_uring_setup": (425, 425), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "pidfd_open": (434, 434), "clone3": (435, 435),
    "pidfd_getfd": (438, 438), "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446), "mount_setattr": (442, 442), "memfd_secret": (447, 447),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH_*

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

_libc_with_gil = ctypes.PyDLL(None, use_errno=True) if sys.platform == "linux" else None


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(name: str, *arguments: object) -> int:
    column, _ = MACHINES[platform.machine()]
    return _check(_libc.syscall(ctypes.c_long(SYSCALLS[name][column]), *arguments), name)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def fork_into_pid_namespace() -> int:
    """As os.fork; the child is process 1 of a pid namespace. (unshare would do it once only: setns back is for real root.)

    The interpreter's own hooks for a fork do not run: the child has only to fork again with os.fork.
    """
    column, _ = MACHINES[platform.machine()]
    numbers = [ctypes.c_long(SYSCALLS["clone"][column]), ctypes.c_ulong(CLONE_NEWPID | signal.SIGCHLD), *[ctypes.c_ulong(0)] * 4]
    return _check(_libc_with_gil.syscall(*numbers), "clone")  # with the lock held: nobody would give it back to the child


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    encode = lambda text: None if text is None else os.fsencode(text)  # noqa: E731
    _check(_libc.mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(options)), f"mount {target}")


def prctl(option: int, *arguments: int) -> None:
    values = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)][:4]
    _check(_libc.prctl(option, *values), f"prctl {option}")


def die_with_parent(how: int = signal.SIGKILL) -> None:
    prctl(PR_SET_PDEATHSIG, how)


PYTHON_UNDER_TMP = "/.python"
_under_tmp: list[tuple[str, str]] = []
"""(where in the new root, where it belongs) of this Python's folders that lie under /tmp; programs are forks and inherit it."""


def hide_memory() -> None:
    """No process of the same user may trace this one, or open its /proc/PID/mem."""
    prctl(PR_SET_DUMPABLE, 0)


# ---- a root of its own -------------------------------------------------------------------------------------------------


def python_folders() -> list[str]:
    """Where this interpreter, its libraries and its packages are."""
    found = [sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))]
    own = Path(__file__).resolve()  # an editable installation puts this repository on the path, with data/ in it
    return found + [path for path in sys.path if path and os.path.isdir(path) and not own.is_relative_to(os.path.realpath(path))]


def _top_folders(paths: list[str]) -> list[str]:
    """Absolute folders, without those that lie in another one. A prefix of `/` or a home itself would show everything."""
    folders: list[str] = []
    for path in sorted({os.path.abspath(p) for p in paths}, key=len):
        if path != "/" and os.path.isdir(path) and not any(Path(path).is_relative_to(folder) for folder in folders):
            folders.append(path)
    return folders


def _bind(source: str, target: str, read_only: bool = True) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    mount(source, target, None, MS_BIND | MS_REC)
    if not read_only:
        return
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd. RDONLY 1, NOSUID 2, NODEV 4; AT_RECURSIVE 0x8000.
    attributes = struct.pack("QQQQ", 1 | 2 | 4, 0, 0, 0)
    try:
        syscall("mount_setattr", -100, os.fsencode(target), 0x8000, attributes, ctypes.c_size_t(len(attributes)))
    except OSError:  # before Linux 5.12: the top mount only; flags that it has may not be taken away
        kept = os.statvfs(source).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
        mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)


def enter_root(mount_point: str) -> None:
    """Change to a root that holds the system's libraries and this Python, read-only, and an empty /tmp; nothing else.

    Needs CAP_SYS_ADMIN in the user namespace that owns the mount namespace. `mount_point`: an empty folder outside of them.
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("none", mount_point, "tmpfs", MS_NOSUID, "mode=755,size=1m,nr_inodes=2k")
    folders = []
    for name in SYSTEM_FOLDERS:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{mount_point}/{name}")
        elif os.path.isdir(f"/{name}"):
            folders.append(f"/{name}")
    for folder in _top_folders(folders + python_folders()):
        _bind(folder, mount_point + folder)
        if Path(folder).is_relative_to("/tmp"):  # an environment that lies there: every program's own /tmp will cover it
            again = f"{PYTHON_UNDER_TMP}/{len(_under_tmp)}"
            _bind(folder, mount_point + again)
            _under_tmp.append((again, folder))
    for name in DEVICES:
        _bind(f"/dev/{name}", f"{mount_point}/dev/{name}", read_only=False)
    for file in SYSTEM_FILES:
        if os.path.exists(file):
            _bind(file, mount_point + file)
    os.makedirs(f"{mount_point}/etc", exist_ok=True)
    Path(mount_point, "etc/passwd").write_text(f"user:x:{PROGRAM_UID}:{PROGRAM_UID}::/tmp:/bin/sh\n", encoding="ascii")
    os.symlink("/tmp", f"{mount_point}/dev/shm")  # where semaphores of multiprocessing are
    os.symlink("/tmp/.stdin", f"{mount_point}/dev/stdin")
    os.makedirs(f"{mount_point}/tmp", exist_ok=True)
    os.mkdir(f"{mount_point}/.old")
    os.chdir(mount_point)
    syscall("pivot_root", b".", b".old")
    os.chdir("/")
    _check(_libc.umount2(b"/.old", MNT_DETACH), "umount2")
    os.rmdir("/.old")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def mount_scratch(num_bytes: int) -> None:
    """A /tmp of this process and its children, in memory. It vanishes with them."""
    mount("none", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=777,size={num_bytes},nr_inodes=16k")
    for source, folder in _under_tmp:
        os.makedirs(folder)
        mount(source, folder, None, MS_BIND | MS_REC)  # read-only, as its source is
    work = "/tmp/work" if _under_tmp else "/tmp"  # a program begins in an empty folder
    os.makedirs(work, exist_ok=True)
    os.chmod(work, 0o777)
    os.chdir(work)


# ---- what a program may not do -----------------------------------------------------------------------------------------


CAP_DAC_READ_SEARCH = 2


def drop_capabilities(kept: int = 0) -> None:
    """All but those of the bit set `kept`."""
    for number in range(64):
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):  # behind the last one; not ours to drop: there are none then
                raise
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    syscall("capset", header, struct.pack("6I", kept, kept, 0, 0, 0, 0))


def become(uid: int, keep_capabilities: bool) -> None:
    """Another user and group, for good."""
    if keep_capabilities:
        prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def all_may_enter(folders: list[str]) -> bool:
    """Whether every user may reach the folders."""
    paths = {path for folder in folders for path in (Path(folder), *Path(folder).parents)}
    return all(os.stat(path).st_mode & 0o005 == 0o005 for path in paths if path.exists())


LANDLOCK_SCOPES = 6  # the version from which on it also keeps signals in


def landlock_version() -> int:
    """0 where the kernel has none (landlock(7), Linux 5.13)."""
    try:
        return syscall("landlock_create_ruleset", None, ctypes.c_size_t(0), 1)
    except (OSError, KeyError):
        return 0


def restrict_files(scratch: str, shared_memory: bool) -> None:
    """From here on: read system folders and Python, write in `scratch`, nothing else. Needs no privilege.

    `shared_memory`: /dev/shm too, which semaphores of multiprocessing need; what is left there is removed by its owner.
    """
    version = landlock_version()
    assert version > 0
    everything = (1 << (13 + (version >= 2) + (version >= 3))) - 1  # files, folders, then renaming, then truncation
    read, on_file = 0b1101, 0b111 | (1 << 14 if version >= 3 else 0)
    attributes = struct.pack("QQQ", everything, 0, 2)[: 24 if version >= LANDLOCK_SCOPES else 8]  # 2: no signals outside
    ruleset = syscall("landlock_create_ruleset", attributes, ctypes.c_size_t(len(attributes)), 0)
    folders = _top_folders([f"/{name}" for name in SYSTEM_FOLDERS] + python_folders())
    rules = [(folder, read) for folder in folders] + [(file, read & on_file) for file in SYSTEM_FILES]
    rules += [(f"/dev/{name}", on_file) for name in DEVICES] + [(scratch, everything)] + [("/dev/shm", everything)] * shared_memory
    for path, rights in rules:
        if not os.path.exists(path):
            continue
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        syscall("landlock_add_rule", ruleset, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def set_limits(limits: dict[int, int]) -> None:
    """Soft and hard limits (resource.RLIMIT_*), never above the hard ones that hold already."""
    for which, value in limits.items():
        _, hard = resource.getrlimit(which)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(which, (value, value))


LOAD, EQUAL, ABOVE, AND, RETURN = 0x20, 0x15, 0x25, 0x54, 0x06  # BPF: LD|W|ABS, JMP|JEQ|K, JMP|JGT|K, ALU|AND|K, RET|K
ALLOW, KILL = 0x7FFF0000, 0x80000000
DENY, NO_SUCH_CALL = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

NEVER = (
    "ptrace syslog personality pivot_root mount umount2 add_key request_key keyctl unshare setns perf_event_open "
    "open_by_handle_at process_vm_readv process_vm_writev kcmp memfd_create memfd_secret bpf userfaultfd io_uring_setup "
    "open_tree move_mount fsopen fsconfig fsmount pidfd_getfd mount_setattr"
).split()
WITHOUT_NAMESPACES = "socket connect bind listen pidfd_open pidfd_send_signal shmget semget msgget mq_open".split()
OTHERS = "kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo".split()


def _argument(number: int, high: bool = False) -> tuple[int, int, int, int]:
    return (LOAD, 0, 0, 16 + 8 * number + 4 * high)  # struct seccomp_data, little-endian


def filter_program(own_namespaces: bool, only_pid: int | None) -> bytes:
    """The BPF program: which system calls of this machine answer "not permitted".

    Without namespaces also: limits of other processes, and every socket that is not a pair. `only_pid`: the one process that
    signals may be sent to; None: no rule.
    """
    column, audit_arch = MACHINES[platform.machine()]
    code: list[tuple[int, int, int, int]] = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit_arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if column == 0:
        code += [(ABOVE, 0, 1, 0x3FFFFFFF), (RETURN, 0, 0, DENY)]  # the x32 calls

    def rule(name: str, *body: tuple[int, int, int, int]) -> None:
        """Where the call is `name`: run `body`, which returns."""
        code.append((EQUAL, 0, len(body), SYSCALLS[name][column]))
        code.extend(body)

    for name in NEVER if own_namespaces else NEVER + WITHOUT_NAMESPACES:
        rule(name, (RETURN, 0, 0, DENY))
    rule("clone3", (RETURN, 0, 0, NO_SUCH_CALL))  # its flags are behind a pointer; libraries fall back to clone
    rule("clone", _argument(0), (AND, 0, 0, CLONE_NEWUSER), (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY))
    if own_namespaces:
        rule("socket", _argument(0), (EQUAL, 0, 1, 1), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY))  # AF_UNIX only
    else:
        for name in OTHERS if only_pid is not None else ():
            own = [only_pid, 0] if name == "kill" else [only_pid]
            tests = [(EQUAL, len(own) - n, 0, pid) for n, pid in enumerate(own)]
            rule(name, _argument(0), *tests, (RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW))
        rule("prlimit64", _argument(0), (EQUAL, 1, 0, 0), (RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW))
        # A datagram to an address, over one of a pair of sockets.
        rule("sendto", _argument(4), (EQUAL, 0, 2, 0), _argument(4, high=True), (EQUAL, 1, 0, 0), (RETURN, 0, 0, DENY),
             (RETURN, 0, 0, ALLOW))  # fmt: skip
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def has_filter() -> bool:
    try:
        prctl(PR_GET_SECCOMP)
    except OSError:
        return False
    return platform.machine() in MACHINES


def filter_system_calls(own_namespaces: bool, only_itself: bool = False) -> None:
    """Install the filter for this process and its children. `only_itself`: signals may be sent to no other process."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    program = filter_program(own_namespaces, os.getpid() if only_itself else None)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(header))

"""The seccomp filter that the runner installs before it reads a program, in both backends (in Docker on top of the engine's own).

Denied are the system calls that no program of a task needs and that widen the kernel's surface, reach past the sandbox's other
walls, or carry something from one case to the next. Classic BPF, assembled here because libseccomp is not everywhere.

    load arch; unless it is ours: kill.  load number; clone3: no such call.  for each denied: equal -> EPERM.
    socket: load its family; unless AF_UNIX -> no such family.  clone: load its flags; any new namespace -> EPERM.  allow.
"""

from __future__ import annotations

import platform
import struct

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ERRNO = 0x00050000
_ALLOW, _EPERM, _NO_SUCH_CALL, _NO_SUCH_FAMILY, _KILL = 0x7FFF0000, _ERRNO | 1, _ERRNO | 38, _ERRNO | 97, 0x80000000
_NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET. clone3 hides its flags behind a pointer, so it is not there
at all: the C library then falls back to clone."""
_AF_UNIX = 1
"""The one family that is allowed, for pairs within a program. Network namespaces do not hold AF_VSOCK (to the host of a virtual machine)
nor AF_ALG (the kernel's ciphers)."""
_X32_BIT = 0x40000000
"""On x86-64 a number with this bit is the x32 variant of the same call: denied altogether, or the list could be walked around."""

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE, _CLONE3, _SOCKET = {"x86_64": 56, "aarch64": 220}, 435, {"x86_64": 41, "aarch64": 198}
# name: (number on x86-64, on aarch64); None where the call does not exist.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # other programs: nothing on /tmp, in memory or in the image is started
    "execve": (59, 221), "execveat": (322, 281),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    # what outlives a process and could tell the next case something
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    # large parts of the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "vmsplice": (278, 75), "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "fanotify_init": (300, 262),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "personality": (135, 92), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # the machine
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "quotactl": (179, 60), "syslog": (103, 116), "lookup_dcookie": (212, 18), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "clock_settime": (227, 112), "settimeofday": (164, 170),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None), "ustat": (136, None),
    "sysfs": (139, None),
}  # fmt: skip


def filter_program(machine: str | None = None) -> bytes:
    """The filter for this machine, an array of struct sock_filter. Raises ValueError on a processor that the table does not know."""
    machine = machine or platform.machine()
    if machine not in _AUDIT_ARCH:
        raise ValueError(f"no system call table for {machine!r}, wanted one of {', '.join(_AUDIT_ARCH)}")
    column = list(_AUDIT_ARCH).index(machine)
    numbers = [row[column] for row in _DENIED.values() if row[column] is not None]
    code = [
        _instruction(_LOAD_WORD, 4),  # seccomp_data.arch
        _instruction(_JUMP_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD_WORD, 0),  # seccomp_data.nr
    ]
    if machine == "x86_64":
        code += [_instruction(_JUMP_AT_LEAST, _X32_BIT, 0, 1), _instruction(_RETURN, _KILL)]
    code += [_instruction(_JUMP_EQUAL, _CLONE3, 0, 1), _instruction(_RETURN, _NO_SUCH_CALL)]
    for number in numbers:
        assert number is not None
        code += [_instruction(_JUMP_EQUAL, number, 0, 1), _instruction(_RETURN, _EPERM)]
    code += [
        _instruction(_JUMP_EQUAL, _SOCKET[machine], 0, 4),
        _instruction(_LOAD_WORD, 16),  # seccomp_data.args[0], its low half
        _instruction(_JUMP_EQUAL, _AF_UNIX, 0, 1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _NO_SUCH_FAMILY),
        _instruction(_JUMP_EQUAL, _CLONE[machine], 0, 3),
        _instruction(_LOAD_WORD, 16),
        _instruction(_JUMP_IF_SET, _NEW_NAMESPACES, 0, 1),
        _instruction(_RETURN, _EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(code)


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """struct sock_filter: u16 code, u8 jt, u8 jf, u32 k."""
    return struct.pack("=HBBI", code, if_true, if_false, operand)

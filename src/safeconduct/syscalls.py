"""The system calls a profile may add to those every sandbox has, and those it never may.

A policy is refused at load by these tables, the filter is compiled with them, and an operator who
asks what was refused is answered from them. What is in neither table cannot be added either.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

# What a profile may add under ``syscalls``, and what that opens.
ADDABLE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ptrace": "programs can stop and steer each other, and try the kernel's debugging code",
        "process_vm_readv": "programs can read each other's memory",
        "process_vm_writev": "programs can change each other's memory",
        "personality": "programs can run at addresses that are not random",
        "memfd_create": "programs can be run that lie in no file and on no disk",
        **dict.fromkeys(
            ("inotify_init", "inotify_init1", "inotify_add_watch", "inotify_rm_watch"),
            "programs learn by name what everybody else uses in the folders they can read",
        ),
        "get_mempolicy": "programs learn on which NUMA node their memory lies",
        "set_mempolicy": "programs choose the NUMA nodes of their memory",
        "mbind": "programs choose the NUMA nodes of their memory",
        "io_setup": "it uses up a number of requests that the whole machine shares (aio-max-nr)",
        "io_submit": "programs reach the kernel's old asynchronous I/O",
        "io_getevents": "programs reach the kernel's old asynchronous I/O",
        "io_pgetevents": "programs reach the kernel's old asynchronous I/O",
        "io_cancel": "programs reach the kernel's old asynchronous I/O",
        "io_destroy": "programs reach the kernel's old asynchronous I/O",
    }
)

_NEVER: Final[Mapping[str, str]] = {
    "it changes what is mounted, which is the sandbox itself": """
        mount umount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig
        fsmount fspick mount_setattr statmount listmount swapon swapoff quotactl quotactl_fd
    """,
    "it makes or enters namespaces, where a program has every capability": "unshare setns listns",
    "its flags lie in memory, where they can be changed after they were judged": "clone3 openat2",
    "what is asked through it passes every filter by": """
        io_uring_setup io_uring_enter io_uring_register
    """,
    "it runs code in the kernel": """
        bpf init_module finit_module delete_module kexec_load kexec_file_load
    """,
    "it stops the kernel halfway through a copy, which makes its mistakes usable": "userfaultfd",
    "it tells what the processor does for others": "perf_event_open",
    "the kernel's keys are kept apart by user, not by sandbox": "keyctl add_key request_key",
    "a filter of the program's own could answer where this one asks": "seccomp",
    "there is no network in this profile": """
        socket bind listen accept accept4 connect
    """,
    "attributes and access lists would stay on the files of the machine": """
        setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat
        file_setattr
    """,
    "it opens files past every folder that was granted": """
        open_by_handle_at name_to_handle_at fanotify_init fanotify_mark
    """,
    "it reaches into other processes": """
        kcmp pidfd_getfd process_madvise process_mrelease migrate_pages move_pages
    """,
    "its memory is hidden from the kernel, and so from every account of it": "memfd_secret",
    "it reaches hardware, or the machine as a whole": """
        iopl ioperm modify_ldt reboot acct syslog vhangup settimeofday clock_settime adjtimex
        clock_adjtime sethostname setdomainname sync syncfs
    """,
}
# What can never be added, and why.
NEVER: Final[Mapping[str, str]] = MappingProxyType(
    {name: reason for reason, names in _NEVER.items() for name in names.split()}
)


def why_never(name: str) -> str:
    """Return why a system call cannot be added to a profile; empty where it can."""
    if name in ADDABLE:
        return ""
    return NEVER.get(name, "it is not among those that a profile may add")

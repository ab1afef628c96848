//! The one module with `unsafe`: system calls that rustix does not wrap.
//!
//! INVARIANT: the launcher and everything it clones is single-threaded, so process-wide effects
//! (signal masks, credentials, fork) have no second thread to surprise.

use std::ffi::CString;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::process::Pid;

/// Namespaces of a template, which its sandboxes share: nothing in them can be changed from there.
pub const CLONE_TEMPLATE: u64 =
    (libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWUTS) as u64;
/// Namespaces of every sandbox of its own.
pub const CLONE_SANDBOX: u64 = (libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC) as u64;
pub const CLONE_NEWNET: u64 = libc::CLONE_NEWNET as u64;
pub const CLONE_NEWUSER: u64 = libc::CLONE_NEWUSER as u64;
/// Linux 5.7, clone3(2); version 2 only.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

pub const MOUNT_ATTR_RDONLY: u64 = 0x1;
pub const MOUNT_ATTR_NOSUID: u64 = 0x2;
pub const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

fn check(result: libc::c_long) -> Result<libc::c_long, Errno> {
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(result)
}

/// Clone this process into new namespaces and a cgroup, clone3(2). `None` is the child.
pub fn clone_into(flags: u64, cgroup: Option<BorrowedFd>) -> Result<Option<Pid>, Errno> {
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        fields: [u64; 11],
    }
    let mut args = CloneArgs::default();
    args.fields[0] = flags;
    args.fields[4] = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.fields[0] |= CLONE_INTO_CGROUP;
        args.fields[10] = u64::try_from(cgroup.as_raw_fd()).map_err(|_| Errno::BADF)?;
    }
    // SAFETY: no CLONE_VM and no stack: the child is a copy, like fork(2). The structure is the
    // kernel's `struct clone_args` (11 u64 fields, size 88) and outlives the call.
    let new =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) });
    let pid = match new {
        // The seccomp filter of a container cannot read the flags behind clone3's pointer, so it
        // says that there is no such call (older ones: EPERM) and judges clone(2) instead. A child
        // that was to be born in a cgroup then has to join it.
        Err(Errno::NOSYS | Errno::PERM) => {
            let flags = flags | libc::SIGCHLD as u64;
            // SAFETY: as above; the other four arguments are unused with these flags.
            check(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })?
        }
        new => new?,
    };
    Ok(i32::try_from(pid).ok().and_then(Pid::from_raw))
}

/// LIMIT: bytes of the stack of a process that shares our memory.
const STACK_BYTES: usize = 256 << 10;

/// Run `body` in a child that shares this process's memory, and stay suspended until the child
/// has called execve(2) or is gone, clone(2) `CLONE_VM` and `CLONE_VFORK`. Returns its pid.
///
/// INVARIANT: `body` never returns, and ends by execve or `_exit` alone.
pub fn clone_sharing(body: &mut dyn FnMut()) -> Result<i32, Errno> {
    extern "C" fn enter(argument: *mut libc::c_void) -> libc::c_int {
        // SAFETY: `argument` is the reference that `clone_sharing` holds while it is suspended.
        let body = unsafe { &mut *argument.cast::<&mut dyn FnMut()>() };
        body();
        127
    }
    let mut stack = vec![0_u128; STACK_BYTES / size_of::<u128>()];
    let mut body = body;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the child has a stack of its own, aligned to 16 bytes, and its own tables of
    // descriptors and signal actions; nobody else runs in this memory until it is done with it.
    let pid = check(
        unsafe {
            libc::clone(enter, stack.as_mut_ptr_range().end.cast(), flags, (&raw mut body).cast())
        }
        .into(),
    )?;
    i32::try_from(pid).map_err(|_| Errno::CHILD)
}

/// Put new user and cgroup namespaces under this process, unshare(2).
pub fn unshare(flags: i32) -> Result<(), Errno> {
    // SAFETY: single-threaded; no memory is shared with another task.
    check(unsafe { libc::unshare(flags) }.into()).map(drop)
}

/// Set attributes of a detached mount and all below it, `mount_setattr(2)`.
pub fn mount_setattr(
    mount: BorrowedFd,
    recursive: bool,
    set: u64,
    mapping: Option<BorrowedFd>,
) -> Result<(), Errno> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        userns: u64,
    }
    let attributes = MountAttr {
        set: set | if mapping.is_some() { MOUNT_ATTR_IDMAP } else { 0 },
        clear: 0,
        propagation: 0,
        userns: mapping.map_or(0, |fd| u64::try_from(fd.as_raw_fd()).unwrap_or(0)),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: an empty NUL-terminated path and the kernel's `struct mount_attr` of 32 bytes.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Empty the bounding set, so that no execve(2) gives a capability back, capabilities(7).
pub fn drop_bounding_set() -> Result<(), Errno> {
    // LIMIT: capability numbers end well below 64; the kernel answers EINVAL past its last one.
    for capability in 0..64 {
        // SAFETY: prctl(2) with scalar arguments.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match check(result.into()) {
            // EPERM: an ordinary user without namespaces; no_new_privs makes the bounding set moot.
            Ok(_) | Err(Errno::PERM) => {}
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Give up every capability for good: bounding, ambient, effective, permitted, inheritable.
pub fn drop_capabilities() -> Result<(), Errno> {
    const HEADER_V3: u32 = 0x2008_0522;
    drop_bounding_set()?;
    // SAFETY: prctl(2) with scalar arguments.
    check(
        unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) }
            .into(),
    )?;
    let header = [HEADER_V3, 0];
    let none = [0_u32; 6];
    // SAFETY: capset(2) version 3: a header of two words and two data records of three words.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) }).map(drop)
}

/// The kernel's Landlock ABI; 0 where Landlock is absent or disabled, landlock(7).
pub fn landlock_abi() -> i32 {
    const VERSION: libc::c_ulong = 1;
    // SAFETY: a null attribute of size zero asks for the version only.
    let abi = check(unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, VERSION)
    });
    abi.ok().and_then(|abi| i32::try_from(abi).ok()).unwrap_or(0)
}

/// Let `rights` be used on `object` and all below it, `landlock_add_rule(2)`.
pub fn allow_beneath(ruleset: BorrowedFd, object: BorrowedFd, rights: u64) -> Result<(), Errno> {
    const PATH_BENEATH: libc::c_int = 1;
    #[repr(C, packed)]
    struct PathBeneath {
        rights: u64,
        object: RawFd,
    }
    let rule = PathBeneath { rights, object: object.as_raw_fd() };
    // SAFETY: the kernel's packed `struct landlock_path_beneath_attr`, which outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0,
        )
    })
    .map(drop)
}

/// Restrict this thread and its future children, `landlock_restrict_self(2)`.
pub fn restrict(ruleset: BorrowedFd) -> Result<(), Errno> {
    // SAFETY: scalar arguments; the kernel checks what the descriptor is.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) })
        .map(drop)
}

/// Install a classic BPF program for this thread and its children, seccomp(2).
///
/// With `listen` the descriptor is returned that tells of each refused call, `seccomp_unotify(2)`.
pub fn load_filter(program: &[u8], listen: bool) -> Result<Option<OwnedFd>, Errno> {
    #[repr(C)]
    struct Program {
        length: u16,
        instructions: *const u8,
    }
    if program.is_empty() || program.len() % 8 != 0 {
        return Err(Errno::INVAL);
    }
    let length = u16::try_from(program.len() / 8).map_err(|_| Errno::INVAL)?;
    let program = Program { length, instructions: program.as_ptr() };
    const SET_MODE_FILTER: libc::c_ulong = 1;
    // Linux 5.19; without the second one a signal would make a call be asked about twice.
    const NEW_LISTENER: libc::c_ulong = 1 << 3;
    const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;
    let flags = if listen { NEW_LISTENER | WAIT_KILLABLE_RECV } else { 0 };
    // SAFETY: the kernel's `struct sock_fprog` pointing at `length` whole instructions.
    let result = check(unsafe {
        libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &raw const program)
    })?;
    if !listen {
        return Ok(None);
    }
    let listener = RawFd::try_from(result).map_err(|_| Errno::BADF)?;
    // SAFETY: the kernel just made this descriptor for us, close-on-exec.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(listener) }))
}

/// Bound one resource, setrlimit(2), soft and hard alike. A lower bound in force stays in force.
pub fn limit(resource: u32, value: u64) -> Result<(), Errno> {
    let mut bound = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid structure; an unknown resource number is answered with EINVAL.
    check(unsafe { libc::getrlimit(resource, &raw mut bound) }.into())?;
    bound.rlim_max = bound.rlim_max.min(value);
    bound.rlim_cur = bound.rlim_max;
    // SAFETY: a valid structure; an unknown resource number is answered with EINVAL.
    check(unsafe { libc::setrlimit(resource, &raw const bound) }.into()).map(drop)
}

/// Close every descriptor from `first` on, `close_range(2)`.
pub fn close_from(first: RawFd) -> Result<(), Errno> {
    let first = libc::c_uint::try_from(first).map_err(|_| Errno::BADF)?;
    // SAFETY: callers hold no live descriptor object at or above `first` that they use again.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) }).map(drop)
}

/// Close every descriptor except `keep`.
pub fn close_all_but(keep: &[RawFd]) -> Result<(), Errno> {
    let mut keep: Vec<RawFd> = keep.to_vec();
    keep.sort_unstable();
    let mut first = 0;
    for fd in keep {
        if fd > first {
            // SAFETY: as in `close_from`; the range ends below a kept descriptor.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) })?;
        }
        first = fd + 1;
    }
    close_from(first)
}

/// Make `fd` appear as `target`, inheritable, dup2(2); equal numbers lose close-on-exec.
pub fn place(fd: RawFd, target: RawFd) -> Result<(), Errno> {
    if fd == target {
        // SAFETY: fcntl(2) with scalar arguments.
        return check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }.into()).map(drop);
    }
    // SAFETY: scalar arguments; the old `target` is owned by nobody in this process any more.
    check(unsafe { libc::dup2(fd, target) }.into()).map(drop)
}

/// A descriptor that reads as ready when a child changed state, signalfd(2). Blocks SIGCHLD.
pub fn child_events() -> Result<OwnedFd, Errno> {
    // SAFETY: the set is initialised by sigemptyset before it is used; the descriptor is new.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()).into())?;
        let fd = check(
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK).into(),
        )?;
        Ok(OwnedFd::from_raw_fd(RawFd::try_from(fd).map_err(|_| Errno::BADF)?))
    }
}

/// Undo what the parent did to signals: default actions, here and in every process to come.
pub fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL needs no handler; KILL and STOP answer EINVAL, which is fine.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Block no signal.
pub fn unblock_signals() -> Result<(), Errno> {
    // SAFETY: an initialised empty set.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()).into())
            .map(drop)
    }
}

/// Send a signal, kill(2): with target -1 to every process this one may signal, except itself.
///
/// The kernel walks all tasks under one lock, so a fork bomb cannot outrun it. INVARIANT: called
/// only by a namespace's pid 1 or inside a Landlock signal scope; never by the launcher.
pub fn kill(target: i32, signal: i32) {
    // SAFETY: scalar arguments; the invariant above bounds whom it reaches.
    unsafe { libc::kill(target, signal) };
}

/// What all waited-for descendants used, getrusage(2) `RUSAGE_CHILDREN`.
pub struct Usage {
    pub cpu_us: u64,
    /// The largest resident set of one of them.
    pub peak_rss_kib: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
}

pub fn children_usage() -> Usage {
    /// Blocks are counted in 512 bytes, whatever the device has.
    const BLOCK_BYTES: u64 = 512;
    // SAFETY: the structure is plain data that getrusage fills; zero is a valid value.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let micros = |time: libc::timeval| (time.tv_sec * 1_000_000 + time.tv_usec).unsigned_abs();
    Usage {
        cpu_us: micros(usage.ru_utime) + micros(usage.ru_stime),
        peak_rss_kib: usage.ru_maxrss.unsigned_abs(),
        read_bytes: usage.ru_inblock.unsigned_abs() * BLOCK_BYTES,
        written_bytes: usage.ru_oublock.unsigned_abs() * BLOCK_BYTES,
    }
}

/// Replace this process, execve(2). Returns only the reason it failed.
pub fn exec(path: &CString, argv: &[CString], environment: &[CString]) -> Errno {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, environment) = (pointers(argv), pointers(environment));
    // SAFETY: both arrays end with NULL and their strings outlive the call.
    let result = unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), environment.as_ptr()) };
    check(result.into()).err().unwrap_or(Errno::IO)
}

/// Leave at once, without running destructors that the parent still owns, `_exit(2)`.
pub fn leave(code: i32) -> ! {
    // SAFETY: never returns; nothing is flushed on purpose.
    unsafe { libc::_exit(code) }
}

/// Take over a descriptor number that the process was started with.
pub fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: called once, at start, for the control descriptor the supervisor passed.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

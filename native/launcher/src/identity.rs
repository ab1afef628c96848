//! Step "identity": who the program is, inside and outside, and what it can never become.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Gid, Pid, Signal, Uid};

use crate::report::{Failure, Step};
use crate::request::Identity;
use crate::{account, sys};

/// LIMIT: bytes read of one file of procfs.
const PROC_BYTES_MAX: usize = 64 << 10;

/// A user namespace that only carries an id mapping for id-mapped mounts, `mount_setattr(2)`.
///
/// On-disk `owner` appears as the sandbox's host ids. Needs root; the helper process that the
/// namespace is born with is gone when this returns.
pub fn mapping(identity: &Identity) -> Result<Option<OwnedFd>, Failure> {
    mapping_for(&account::open_folder("/proc".as_ref())?, identity, identity.uid)
}

/// The same for one sandbox of many, whose uid is `uid`.
pub fn mapping_for(
    proc: &OwnedFd,
    identity: &Identity,
    uid: u32,
) -> Result<Option<OwnedFd>, Failure> {
    let Some((owner_uid, owner_gid)) = identity.owner else {
        return Ok(None);
    };
    let gid = identity.gid + (uid - identity.uid);
    let launcher = rustix::process::getpid();
    let Some(pid) = sys::clone_into(sys::CLONE_NEWUSER, None).step("clone id mapping")? else {
        hold(launcher);
    };
    let taken = write(proc, &format!("{pid}/uid_map"), &format!("{owner_uid} {uid} 1"))
        .and_then(|()| write(proc, &format!("{pid}/gid_map"), &format!("{owner_gid} {gid} 1")))
        .and_then(|()| open(proc, &format!("{pid}/ns/user"), OFlags::RDONLY));
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    taken.map(Some)
}

/// Hold the namespace open until the launcher has taken it and kills us. It may die first, so no
/// descriptor of its is kept (a copy of its socket would hide its death) and we die with it.
fn hold(launcher: Pid) -> ! {
    let bound = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let orphan = rustix::process::getppid() != Some(launcher);
    if bound.is_err() || orphan || sys::close_all_but(&[]).is_err() {
        sys::leave(1);
    }
    loop {
        rustix::event::pause();
    }
}

/// Map one host id onto the id seen inside. The caller is in a fresh user namespace.
///
/// `/proc/self` belongs to us only while dumpable, proc(5).
pub fn map_self(proc: &OwnedFd, inside: u32, uid: u32, gid: u32) -> Result<(), Failure> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).step("dumpable")?;
    write(proc, "self/uid_map", &format!("{inside} {uid} 1"))?;
    // user_namespaces(7): an unprivileged writer must give up setgroups(2) first.
    write(proc, "self/setgroups", "deny")?;
    write(proc, "self/gid_map", &format!("{inside} {gid} 1"))
}

/// Tell whether this process is root and may become other users. Root of a user namespace that maps
/// only some ids may not (setgroups(2) and setresuid(2) refuse), and confines itself as an ordinary
/// user does.
pub fn is_root() -> bool {
    // The ids of machine.py: all of them or none.
    const FIRST: u64 = 0x7000_0000;
    const END: u64 = 0x7F00_0000;
    let maps_all = |path: &&str| {
        let Ok(text) = std::fs::read_to_string(path) else {
            return true; // a kernel without user namespaces
        };
        text.lines().any(|line| {
            let fields = line.split_ascii_whitespace();
            let fields: Vec<u64> = fields.filter_map(|number| number.parse().ok()).collect();
            fields.len() == 3 && fields[0] <= FIRST && END <= fields[0] + fields[2]
        })
    };
    rustix::process::geteuid().is_root()
        && ["/proc/self/uid_map", "/proc/self/gid_map"].iter().all(maps_all)
}

/// Stop being host root: no supplementary groups, then gid, then uid, in that order.
pub fn switch(uid: u32, gid: u32) -> Result<(), Failure> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[]).step("setgroups")?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).step("setresgid")?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).step("setresuid")
}

/// Have the kernel end what is started from here on first, where memory runs out: else it ends what
/// has most of it, and so an init before a small program that fills a tmpfs. A zero written to the
/// descriptor takes that back for this process, proc(5) `oom_score_adj`.
pub fn end_first(proc: &OwnedFd) -> Option<OwnedFd> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).ok()?;
    let score = open(proc, "self/oom_score_adj", OFlags::WRONLY).ok();
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).ok()?;
    score.filter(|score| rustix::io::write(score, b"1000").is_ok())
}

/// Give up all privilege for good: capabilities, and gaining any by execve(2).
pub fn renounce(capabilities: bool) -> Result<(), Failure> {
    if capabilities {
        sys::drop_capabilities().step("drop capabilities")?;
    }
    rustix::thread::set_no_new_privs(true).step("no_new_privs")?;
    // Hides our memory, environment and descriptors from the program, proc(5).
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).step("not dumpable")
}

/// Read a file of procfs that describes a process.
pub fn read_proc(proc: &OwnedFd, path: &str) -> Result<String, Failure> {
    let file = open(proc, path, OFlags::RDONLY)?;
    let mut text = Vec::new();
    let mut buffer = [0_u8; 4096];
    while text.len() < PROC_BYTES_MAX {
        let count = rustix::io::read(&file, &mut buffer).step_on("read", path)?;
        if count == 0 {
            break;
        }
        text.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8(text).map_err(|_| Failure::protocol("procfs is not text"))
}

fn write(proc: &OwnedFd, path: &str, text: &str) -> Result<(), Failure> {
    let file = open(proc, path, OFlags::WRONLY)?;
    rustix::io::write(file.as_fd(), text.as_bytes()).step_on("write", path)?;
    Ok(())
}

fn open(proc: &OwnedFd, path: &str, access: OFlags) -> Result<OwnedFd, Failure> {
    rustix::fs::openat(proc, path, access | OFlags::CLOEXEC, Mode::empty()).step_on("open", path)
}

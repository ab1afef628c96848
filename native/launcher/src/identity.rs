//! Step "identity": who the program is, inside and outside, and what it can never become.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Gid, Pid, Signal, Uid};

use crate::report::{Failure, Step};
use crate::request::Identity;
use crate::sys;

/// A user namespace that only carries an id mapping for id-mapped mounts, `mount_setattr(2)`.
///
/// On-disk `owner` appears as the sandbox's host ids. Needs root; the helper process that the
/// namespace is born with is gone when this returns.
pub fn mapping(identity: &Identity) -> Result<Option<OwnedFd>, Failure> {
    let Some((owner_uid, owner_gid)) = identity.owner else {
        return Ok(None);
    };
    let launcher = rustix::process::getpid();
    let Some(pid) = sys::clone_into(sys::CLONE_NEWUSER).step("clone id mapping")? else {
        hold(launcher);
    };
    let taken = take_mapping(identity, pid, owner_uid, owner_gid);
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
        let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    }
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

fn take_mapping(identity: &Identity, pid: i32, uid: u32, gid: u32) -> Result<OwnedFd, Failure> {
    write(
        &format!("/proc/{pid}/uid_map"),
        &format!("{uid} {} 1", identity.uid),
    )?;
    write(
        &format!("/proc/{pid}/gid_map"),
        &format!("{gid} {} 1", identity.gid),
    )?;
    let namespace = format!("/proc/{pid}/ns/user");
    rustix::fs::open(
        namespace.as_str(),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step("open id mapping")
}

/// Map the one host id onto the id seen inside. The caller is in a fresh user namespace.
///
/// `/proc/self` belongs to us only while dumpable, proc(5).
pub fn map_self(identity: &Identity) -> Result<(), Failure> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).step("dumpable")?;
    let (inside, uid, gid) = (identity.inside, identity.uid, identity.gid);
    write("/proc/self/uid_map", &format!("{inside} {uid} 1"))?;
    // user_namespaces(7): an unprivileged writer must give up setgroups(2) first.
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/gid_map", &format!("{inside} {gid} 1"))
}

/// Stop being host root: no supplementary groups, then gid, then uid, in that order.
pub fn switch(identity: &Identity) -> Result<(), Failure> {
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    rustix::thread::set_thread_groups(&[]).step("setgroups")?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).step("setresgid")?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).step("setresuid")
}

/// Give up all privilege for good: capabilities, and gaining any by execve(2).
pub fn renounce(capabilities: bool) -> Result<(), Failure> {
    if capabilities {
        sys::drop_capabilities().step("drop capabilities")?;
    }
    rustix::thread::set_no_new_privs(true).step("no_new_privs")?;
    // Hides init's memory, environment and descriptors from the program, proc(5).
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).step("not dumpable")
}

fn write(path: &str, text: &str) -> Result<(), Failure> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).step_on("open", path)?;
    rustix::io::write(file.as_fd(), text.as_bytes()).step_on("write", path)?;
    Ok(())
}

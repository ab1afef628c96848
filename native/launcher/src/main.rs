//! safeconduct-launcher: makes sandboxes for one supervisor, and nothing else.
//!
//! Started with an empty environment and one socket to the supervisor, whose number is its only
//! argument. Each datagram on it carries the descriptors of one call (`request.rs`); the fate of the call is told on that
//! call's own channel. The launcher ends, and everything it started with it, when the supervisor
//! is gone. Single-threaded by design: it forks without exec.

mod confine;
mod identity;
mod init;
mod program;
mod report;
mod request;
mod root;
mod sys;

use std::collections::HashSet;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use rustix::process::{Pid, Signal, WaitOptions};

use report::{Failure, Message, Step};
use request::{Job, Layer};

/// LIMIT: descriptors of one datagram; the kernel's own bound is 253, unix(7).
const DESCRIPTORS_MAX: usize = 64;

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!(
                "safeconduct-launcher: {} (errno {})",
                failure.step, failure.errno
            );
            ExitCode::from(125)
        }
    }
}

fn serve() -> Result<(), Failure> {
    let number = std::env::args()
        .nth(1)
        .and_then(|number| number.parse().ok());
    let number = number
        .filter(|number| *number > 2)
        .ok_or(Failure::protocol("no control socket"))?;
    sys::close_all_but(&[0, 1, 2, number]).step("close inherited descriptors")?;
    let control = sys::adopt(number);
    rustix::io::fcntl_setfd(&control, rustix::io::FdFlags::CLOEXEC).step("control descriptor")?;
    let dump = rustix::process::DumpableBehavior::NotDumpable;
    rustix::process::set_dumpable_behavior(dump).step("not dumpable")?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).step("subreaper")?;
    // A child that the supervisor forked without exec may hold a copy of the socket's other end,
    // so end of file alone does not tell that the supervisor is gone.
    let supervisor = rustix::process::getppid().ok_or(Failure::protocol("no supervisor"))?;
    let none = rustix::process::PidfdFlags::empty();
    let supervisor = rustix::process::pidfd_open(supervisor, none).step("supervisor")?;
    let mut launcher = Launcher::new()?;
    let hello = Message::Hello {
        version: request::VERSION,
        landlock_abi: sys::landlock_abi(),
    };
    report::send(&control, &hello);
    loop {
        let mut polled = [
            PollFd::new(&control, PollFlags::IN),
            PollFd::new(&launcher.events, PollFlags::IN),
            PollFd::new(&supervisor, PollFlags::IN),
        ];
        match rustix::event::poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Failure::new("poll", errno)),
        }
        let asked = !polled[0].revents().is_empty();
        if !polled[2].revents().is_empty() {
            return Ok(());
        }
        launcher.reap();
        if asked && !launcher.accept(&control)? {
            return Ok(());
        }
    }
}

struct Launcher {
    events: OwnedFd,
    /// First processes of living sandboxes.
    inits: HashSet<i32>,
    lifeline: OwnedFd,
    /// Held open for as long as this process lives; its closing tells every init to end.
    _life: OwnedFd,
    as_root: bool,
}

impl Launcher {
    fn new() -> Result<Self, Failure> {
        let flags = rustix::pipe::PipeFlags::CLOEXEC;
        let (lifeline, life) = rustix::pipe::pipe_with(flags).step("lifeline")?;
        Ok(Self {
            events: sys::child_events().step("signalfd")?,
            inits: HashSet::new(),
            lifeline,
            _life: life,
            as_root: rustix::process::geteuid().is_root(),
        })
    }

    /// Take one request. False when the supervisor has closed its end.
    fn accept(&mut self, control: &OwnedFd) -> Result<bool, Failure> {
        let Some(descriptors) = receive(control)? else {
            return Ok(false);
        };
        match request::parse(descriptors) {
            Ok(job) => {
                if let Err(failure) = self.start(&job) {
                    report::send(&job.channel, &Message::Failed(&failure));
                }
            }
            Err((Some(channel), failure)) => report::send(&channel, &Message::Failed(&failure)),
            Err((None, _)) => {}
        }
        Ok(true)
    }

    fn start(&mut self, job: &Job) -> Result<(), Failure> {
        let setting = init::Setting {
            as_root: self.as_root,
            mapping: identity::mapping(&job.request.identity)?,
            lifeline: rustix::io::fcntl_dupfd_cloexec(&self.lifeline, 3).step("lifeline")?,
        };
        let mut flags = 0;
        if job.request.layers.contains(&Layer::Namespaces) {
            flags |= sys::CLONE_NAMESPACES;
            if !self.as_root {
                flags |= sys::CLONE_NEWUSER;
            }
        }
        match sys::clone_into(flags).step("clone namespaces")? {
            Some(pid) => {
                self.inits.insert(pid);
                Ok(())
            }
            None => init::run(job, &setting),
        }
    }

    /// Collect dead inits. An init that died by a signal without a pid namespace leaves orphans,
    /// which the kernel gave to us, prctl(2) PR_SET_CHILD_SUBREAPER: end them.
    fn reap(&mut self) {
        let mut buffer = [0_u8; 1024];
        while rustix::io::read(&self.events, &mut buffer).is_ok() {}
        while let Ok(Some((pid, _))) = rustix::process::wait(WaitOptions::NOHANG) {
            self.inits.remove(&pid.as_raw_nonzero().get());
            self.end_orphans();
        }
    }

    fn end_orphans(&self) {
        let path = format!("/proc/self/task/{}/children", rustix::process::getpid());
        let Ok(children) = std::fs::read_to_string(path) else {
            return;
        };
        let strangers = children
            .split_ascii_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .filter(|pid| !self.inits.contains(pid))
            .filter_map(Pid::from_raw);
        for orphan in strangers {
            let _ = rustix::process::kill_process(orphan, Signal::KILL);
        }
    }
}

/// Receive the descriptors of one datagram; `None` at end of file.
fn receive(control: &OwnedFd) -> Result<Option<Vec<OwnedFd>>, Failure> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0_u8; 8];
    let mut data = [IoSliceMut::new(&mut byte)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = match rustix::net::recvmsg(control, &mut data, &mut ancillary, flags) {
        Ok(received) => received,
        Err(Errno::INTR) => return Ok(Some(Vec::new())),
        Err(errno) => return Err(Failure::new("receive request", errno)),
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    // Cut short where this process has no room for more: a call never runs with a part of them.
    let whole = !received.flags.contains(ReturnFlags::CTRUNC);
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if !whole {
        descriptors.truncate(1);
    }
    Ok(Some(descriptors))
}

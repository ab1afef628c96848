//! safeconduct-launcher: makes sandboxes for one supervisor, and nothing else.
//!
//! Started with an empty environment, one socket to the supervisor, whose number is its first
//! argument, and the tier. Each datagram on the socket asks for a template (`template.rs`), a
//! process of its own that makes the sandboxes of one plan, or for clones of mounts. The launcher
//! ends, and everything it started with it, when the supervisor is gone. Single-threaded by
//! design: it forks without exec.

mod account;
mod confine;
mod identity;
mod init;
mod overlay;
mod program;
mod receive;
mod report;
mod request;
mod root;
mod sys;
mod template;

use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::WaitOptions;

use report::{Failure, Message, Step};

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
    let mut arguments = std::env::args().skip(1);
    let number = arguments.next().and_then(|number| number.parse().ok());
    let number = number
        .filter(|number| *number > 2)
        .ok_or(Failure::protocol("no control socket"))?;
    sys::close_all_but(&[0, 1, 2, number]).step("close inherited descriptors")?;
    let control = sys::adopt(number);
    rustix::io::fcntl_setfd(&control, rustix::io::FdFlags::CLOEXEC).step("control descriptor")?;
    // A child that the supervisor forked without exec may hold a copy of the socket's other end,
    // so end of file alone does not tell that the supervisor is gone.
    let supervisor = rustix::process::getppid().ok_or(Failure::protocol("no supervisor"))?;
    let none = rustix::process::PidfdFlags::empty();
    let supervisor = rustix::process::pidfd_open(supervisor, none).step("supervisor")?;
    let prepared = arguments
        .next()
        .filter(|tier| tier == "full")
        .map_or(Ok(()), |_| root::own_namespaces());
    if let Err(failure) = prepared {
        report::send(&control, &Message::Failed(&failure));
        return Ok(());
    }
    let dump = rustix::process::DumpableBehavior::NotDumpable;
    rustix::process::set_dumpable_behavior(dump).step("not dumpable")?;
    let launcher = Launcher::new()?;
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
}

impl Launcher {
    fn new() -> Result<Self, Failure> {
        let events = sys::child_events().step("signalfd")?;
        Ok(Self { events })
    }

    /// Take one request. False when the supervisor has closed its end.
    fn accept(&self, control: &OwnedFd) -> Result<bool, Failure> {
        let Some((kind, mut descriptors)) = receive::datagram(control)? else {
            return Ok(false);
        };
        if descriptors.is_empty() {
            return Ok(true);
        }
        // INVARIANT: the first descriptor is where the answer goes.
        let answer = descriptors.remove(0);
        let done = match kind.as_slice() {
            b"template" => self.template(&answer, descriptors),
            b"clone" => clone(&answer, descriptors),
            _ => Err(Failure::protocol("unknown request")),
        };
        if let Err(failure) = done {
            report::send(&answer, &Message::Failed(&failure));
        }
        Ok(true)
    }

    fn template(&self, answer: &OwnedFd, descriptors: Vec<OwnedFd>) -> Result<(), Failure> {
        let [document, program] = receive::exactly(descriptors)?;
        let plan = request::plan(&document)?;
        let filter = request::filter(&program)?;
        match sys::clone_into(template::namespaces(&plan), None).step("clone namespaces")? {
            Some(_) => Ok(()),
            None => template::run(&plan, filter, answer),
        }
    }

    fn reap(&self) {
        receive::drain(&self.events);
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
    }
}

/// Clone mounts for a sandbox that is bound late.
fn clone(answer: &OwnedFd, descriptors: Vec<OwnedFd>) -> Result<(), Failure> {
    let [document] = receive::exactly(descriptors)?;
    let asked = request::clones(&document)?;
    let mapping = identity::mapping(&asked.identity)?;
    let mapping = mapping.as_ref().map(AsFd::as_fd);
    let trees = root::clone_all(&asked.mounts, mapping)?;
    let borrowed: Vec<_> = trees.iter().map(AsFd::as_fd).collect();
    report::send_with(answer, &Message::Clones, &borrowed);
    Ok(())
}

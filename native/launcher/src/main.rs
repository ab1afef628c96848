//! safeconduct-launcher: makes sandboxes for one supervisor, and nothing else.
//!
//! Started with an empty environment, one socket to the supervisor, whose number is its first
//! argument, and the tier. Each datagram on the socket asks for a template (`template.rs`), a
//! process of its own that makes the sandboxes of one plan, or for clones of mounts. The launcher
//! ends, and everything it started before it, when the supervisor is gone. Single-threaded by
//! design: it forks without exec.

mod account;
mod confine;
#[cfg(test)]
mod fuzz;
mod identity;
mod init;
mod overlay;
mod program;
mod receive;
mod report;
mod request;
mod root;
mod site;
mod sys;
mod template;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::WaitOptions;

use crate::request::Identity;

use report::{Failure, Message, Step};

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("safeconduct-launcher: {} (errno {})", failure.step, failure.errno);
            ExitCode::from(125)
        }
    }
}

fn serve() -> Result<(), Failure> {
    // A program starts with what we have: Rust ignores SIGPIPE, a supervisor what it likes.
    sys::reset_signals();
    let mut arguments = std::env::args().skip(1);
    let number = arguments.next().and_then(|number| number.parse().ok());
    let number =
        number.filter(|number| *number > 2).ok_or(Failure::protocol("no control socket"))?;
    sys::close_all_but(&[0, 1, 2, number]).step("close inherited descriptors")?;
    let control = sys::adopt(number);
    rustix::io::fcntl_setfd(&control, rustix::io::FdFlags::CLOEXEC).step("control descriptor")?;
    // A child that the supervisor forked without exec may hold a copy of the socket's other end,
    // so end of file alone does not tell that the supervisor is gone.
    let supervisor = rustix::process::getppid().ok_or(Failure::protocol("no supervisor"))?;
    let none = rustix::process::PidfdFlags::empty();
    let supervisor = rustix::process::pidfd_open(supervisor, none).step("supervisor")?;
    let prepared =
        arguments.next().filter(|tier| tier == "full").map_or(Ok(()), |_| root::own_namespaces());
    if let Err(failure) = prepared {
        report::send(&control, &Message::Failed(&failure));
        return Ok(());
    }
    let dump = rustix::process::DumpableBehavior::NotDumpable;
    rustix::process::set_dumpable_behavior(dump).step("not dumpable")?;
    let mut launcher = Launcher::new()?;
    let hello = Message::Hello { version: request::VERSION, landlock_abi: sys::landlock_abi() };
    report::send(&control, &hello);
    let ended = launcher.serve(&control, &supervisor);
    launcher.end();
    ended
}

/// LIMIT: how long templates may take to end.
const ENDING_MAX: Duration = Duration::from_secs(4);
/// LIMIT: id mappings that are kept for sandboxes that are bound late.
const MAPPINGS_MAX: usize = 64;

struct Launcher {
    events: OwnedFd,
    lifeline: OwnedFd,
    /// Held open until this process ends; its closing tells every template to end.
    life: Option<OwnedFd>,
    /// A process that exists only to have one made takes as long as a whole sandbox.
    mappings: HashMap<Identity, OwnedFd>,
}

impl Launcher {
    fn new() -> Result<Self, Failure> {
        let events = sys::child_events().step("signalfd")?;
        let (lifeline, life) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).step("lifeline")?;
        Ok(Self { events, lifeline, life: Some(life), mappings: HashMap::new() })
    }

    /// Take requests until the supervisor is gone.
    fn serve(&mut self, control: &OwnedFd, supervisor: &OwnedFd) -> Result<(), Failure> {
        loop {
            let mut polled = [
                PollFd::new(control, PollFlags::IN),
                PollFd::new(&self.events, PollFlags::IN),
                PollFd::new(supervisor, PollFlags::IN),
            ];
            match rustix::event::poll(&mut polled, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Failure::new("poll", errno)),
            }
            let asked = !polled[0].revents().is_empty();
            if !polled[2].revents().is_empty() {
                return Ok(());
            }
            self.reap();
            if asked && !self.accept(control)? {
                return Ok(());
            }
        }
    }

    /// Tell every template to end and wait until they did; who does not dies with us.
    fn end(mut self) {
        drop(self.life.take());
        let begun = Instant::now();
        let some = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        while begun.elapsed() < ENDING_MAX && !self.reap() {
            let mut polled = [PollFd::new(&self.events, PollFlags::IN)];
            let _ = rustix::event::poll(&mut polled, Some(&some));
        }
    }

    /// Take one request. False when the supervisor has closed its end.
    fn accept(&mut self, control: &OwnedFd) -> Result<bool, Failure> {
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
            b"clone" => self.clone(&answer, descriptors),
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
            None => template::run(&plan, filter, answer, &self.lifeline),
        }
    }

    /// Clone mounts for a sandbox that is bound late.
    fn clone(&mut self, answer: &OwnedFd, descriptors: Vec<OwnedFd>) -> Result<(), Failure> {
        let [document] = receive::exactly(descriptors)?;
        let asked = request::clones(&document)?;
        let mapping = self.mapping(asked.identity)?;
        let trees = root::clone_all(&asked.mounts, mapping)?;
        let borrowed: Vec<_> = trees.iter().map(AsFd::as_fd).collect();
        report::send_with(answer, &Message::Clones, &borrowed);
        Ok(())
    }

    fn mapping(&mut self, identity: Identity) -> Result<Option<BorrowedFd<'_>>, Failure> {
        if !self.mappings.contains_key(&identity) {
            if self.mappings.len() == MAPPINGS_MAX {
                self.mappings.clear();
            }
            let made = identity::mapping(&identity)?;
            self.mappings.extend(made.map(|fd| (identity, fd)));
        }
        Ok(self.mappings.get(&identity).map(AsFd::as_fd))
    }

    /// Collect dead templates; tell whether none is left.
    fn reap(&self) -> bool {
        receive::drain(&self.events);
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some(_)) => {}
                ended => return matches!(ended, Err(Errno::CHILD)),
            }
        }
    }
}

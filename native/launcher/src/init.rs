//! Step "init": the first process of a sandbox. It finishes the walls around itself, makes the stub
//! that becomes the program, and ends the whole tree when the program ends, the wall limit passes,
//! or whoever asked for it is gone.
//!
//! Order of confinement (each step still needs what the next one takes away):
//! cgroup → private mounts → Landlock ruleset (in a late sandbox also mounts and rules of the call)
//! → stop being root → user namespace → no capabilities, no_new_privs → stub → rlimits → Landlock →
//! seccomp → here the stub waits for its program → execve.

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Signal, WaitOptions};
use rustix::time::{TimerfdClockId, TimerfdFlags};

use crate::report::{self, Exit, Failure, Message, Step};
use crate::request::{Bind, Layer, Mount};
use crate::template::{Birth, Template};
use crate::{account, identity, program, receive, request, root, sys};

/// What init and stub share.
pub struct Sandbox<'a> {
    pub template: &'a Template<'a>,
    pub birth: &'a Birth,
    /// Armed by the stub with the wall limit of its program.
    pub timer: OwnedFd,
    pub ruleset: Option<OwnedFd>,
    /// The mounts that came late.
    pub late: Vec<Mount>,
}

/// Run as the first process of a new sandbox. Never returns.
pub fn run(template: &Template, birth: &Birth) -> ! {
    let Err(failure) = live(template, birth);
    report::send(&birth.channel, &Message::Failed(&failure));
    sys::leave(1)
}

/// Returns only what kept the program from being started.
fn live(template: &Template, birth: &Birth) -> Result<Infallible, Failure> {
    let plan = template.plan;
    template.keep_only(birth)?;
    birth.cgroups.join()?;
    let accounts = birth.cgroups.accounts(&plan.cgroups);
    let score = identity::end_first(&template.proc);
    let (ruleset, late) = if plan.has(Layer::Namespaces) {
        build_walls(template, birth)?
    } else {
        (join_outer_domain(template, birth)?, Vec::new())
    };
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags).step("timer")?;
    let sandbox = Sandbox { template, birth, timer, ruleset, late };
    let events = sys::child_events().step("signalfd")?;
    // Suspended until the stub has become the program or is gone: it costs no memory of its own,
    // and execve(2) has none to tear down. Until then the stub watches for us.
    let program = sys::clone_sharing(&mut || program::run(&sandbox)).step("fork stub")?;
    let _ = score.map(|score| rustix::io::write(score, b"0"));
    // Our copies would keep the supervisor from seeing the end of the program's output.
    for fd in [&birth.stdout, &birth.stderr] {
        sys::place(birth.null.as_raw_fd(), fd.as_raw_fd()).step("close output")?;
    }
    let exit = sandbox.watch(&events, program, &accounts);
    if exit.signal.is_some() && exit.wall_us == 0 {
        // Somebody ended the stub before it started its clock: there was no program.
        return Err(Failure { stale: true, ..Failure::new("stub", Errno::CHILD) });
    }
    // The supervisor waits for this, so before anything is given back.
    report::send(&birth.channel, &Message::Exited(exit));
    sys::leave(0)
}

/// Finish the root, enter the user namespace, give up all privilege.
fn build_walls(
    template: &Template,
    birth: &Birth,
) -> Result<(Option<OwnedFd>, Vec<Mount>), Failure> {
    let plan = template.plan;
    sys::unshare(libc::CLONE_NEWCGROUP).step("cgroup namespace")?;
    let mut late = Bind::default();
    let mut ruleset = None;
    if let Some(root) = &template.root {
        let mapping = birth.mapping.as_ref().map(AsFd::as_fd);
        root.finish(plan, mapping, birth.channel.as_fd()).map_err(Failure::or_stale)?;
        if plan.has(Layer::Landlock) {
            ruleset = Some(template.rules.ruleset(None).map_err(Failure::or_stale)?);
        }
        if plan.late {
            let received = receive::datagram(&birth.channel)?;
            let (inline, mut trees) = received.ok_or(Failure::protocol("no bind"))?;
            late = request::document(&inline, &mut trees)?;
            root.bind(plan, &late.mounts, trees).map_err(Failure::or_stale)?;
            if let Some(ruleset) = &ruleset {
                template.rules.extend(ruleset, &late.landlock).map_err(Failure::or_stale)?;
            }
        }
    }
    if template.as_root {
        identity::switch(birth.uid, birth.gid)?;
    }
    // It comes with every capability in it, the bounding set included, user_namespaces(7).
    sys::unshare(libc::CLONE_NEWUSER).step("user namespace")?;
    identity::map_self(&template.proc, plan.identity.inside, birth.uid, birth.gid)?;
    identity::renounce(plan.has(Layer::Capabilities))?;
    // Credential changes clear it, so it is set last, prctl(2) PR_SET_PDEATHSIG.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("pdeathsig")?;
    Ok((ruleset, late.mounts))
}

/// Without a pid namespace the tree is held by adoption and by a Landlock signal scope: this
/// process joins the outer domain, the program gets a second one nested in it, so that we can
/// signal the program and the program cannot signal us.
fn join_outer_domain(template: &Template, birth: &Birth) -> Result<Option<OwnedFd>, Failure> {
    let plan = template.plan;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).step("subreaper")?;
    let ruleset = template.rules.ruleset(birth.scratch.as_ref())?;
    if template.as_root {
        if plan.has(Layer::Capabilities) {
            sys::drop_bounding_set().step("bounding set")?;
        }
        identity::switch(birth.uid, birth.gid)?;
    }
    identity::renounce(plan.has(Layer::Capabilities))?;
    sys::restrict(ruleset.as_fd()).step("landlock")?;
    // No death signal: the lifeline tells, and then the tree is ended before us.
    Ok(Some(ruleset))
}

impl Sandbox<'_> {
    /// Watch the program until it ends, time is up, or supervisor or launcher are gone.
    fn watch(&self, events: &OwnedFd, program: i32, accounts: &[Option<OwnedFd>]) -> Exit {
        let mut exit = Exit::default();
        loop {
            let mut polled = [
                PollFd::new(events, PollFlags::IN),
                PollFd::new(&self.timer, PollFlags::IN),
                PollFd::new(&self.birth.channel, PollFlags::RDHUP | PollFlags::IN),
                PollFd::new(&self.template.lifeline, PollFlags::IN),
            ];
            // The program is of our uid and may bound what we may open, to none, prlimit(2), with
            // which poll(2) refuses: whoever cannot watch any more ends the tree.
            let blind =
                matches!(rustix::event::poll(&mut polled, None), Err(e) if e != Errno::INTR);
            let told = polled[2].revents();
            let gone = blind || !((told - PollFlags::IN) | polled[3].revents()).is_empty();
            if told == PollFlags::IN {
                // One byte, the number of a signal for the program and its process group, as a
                // terminal sends it; 0 is none, kill(2).
                let asked = receive::datagram(&self.birth.channel).ok().flatten();
                let number = asked.and_then(|(bytes, _)| bytes.first().copied());
                sys::kill(-program, number.map_or(0, i32::from));
            }
            receive::drain(events);
            let (ended, alone) = reap(program);
            if let Some(status) = ended {
                (exit.code, exit.signal) = status;
                if !alone {
                    end_tree();
                }
                break;
            }
            exit.wall_limit = !polled[1].revents().is_empty();
            if exit.wall_limit || gone {
                end_tree();
                break;
            }
        }
        exit.wall_us = program::running_us(&self.timer);
        let usage = sys::children_usage();
        exit.cpu_us = usage.cpu_us;
        exit.peak_rss_kib = usage.peak_rss_kib;
        exit.read_bytes = usage.read_bytes;
        exit.written_bytes = usage.written_bytes;
        if exit.code != Some(0) {
            exit.full = root::full(self.template.plan);
        }
        exit.accounts = account::read(accounts);
        exit
    }
}

type Status = (Option<i32>, Option<i32>);

/// Collect every dead child; say how `program` ended once it is among them, and whether nothing
/// else is left: all that it ever started are children of ours by then.
fn reap(program: i32) -> (Option<Status>, bool) {
    let mut ended = None;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == program => {
                ended = Some((status.exit_status(), status.terminating_signal()));
            }
            Err(Errno::CHILD) => return (ended, true),
            Ok(None) => return (ended, false),
            _ => {}
        }
    }
}

/// Kill all that is left and wait until the kernel says there are no children.
fn end_tree() {
    loop {
        sys::kill(-1, libc::SIGKILL);
        if matches!(rustix::process::wait(WaitOptions::empty()), Err(Errno::CHILD)) {
            return;
        }
    }
}

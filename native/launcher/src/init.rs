//! Step "init": the first process of a sandbox. It builds the walls around itself, starts the
//! program inside them, and ends the whole tree when the program ends, the wall limit passes, or
//! whoever asked for it is gone.
//!
//! Order of confinement (each step still needs what the next one takes away):
//! cgroup → private root → hostname → stop being root → user namespace → Landlock ruleset opened
//! → capabilities, no_new_privs → fork → rlimits → cwd → Landlock → seccomp → execve.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use landlock::RulesetCreated;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Signal, WaitOptions};

use crate::report::{self, Exit, Failure, Message, Step};
use crate::request::{Job, Layer};
use crate::{confine, identity, program, root, sys};

/// LIMIT: how long a stub may take to become the program.
const EXEC_TIMEOUT: Duration = Duration::from_secs(15);
/// LIMIT: the longest wall limit, a year, so that the deadline can be computed.
const WALL_MS_MAX: u64 = 365 * 24 * 3600 * 1000;

/// What the parent already decided for this sandbox before it cloned.
pub struct Setting {
    pub as_root: bool,
    pub mapping: Option<OwnedFd>,
    /// Read end of a pipe whose write end only the launcher holds.
    pub lifeline: OwnedFd,
}

/// Run as the first process of a new sandbox. Never returns.
pub fn run(job: &Job, setting: &Setting) -> ! {
    let message = match live(job, setting) {
        Ok(exit) => Message::Exited(exit),
        Err(failure) => {
            report::send(&job.channel, &Message::Failed(&failure));
            sys::leave(1);
        }
    };
    report::send(&job.channel, &message);
    sys::leave(0)
}

fn live(job: &Job, setting: &Setting) -> Result<Exit, Failure> {
    drop_descriptors(job, setting)?;
    let ruleset = build_walls(job, setting)?;
    let events = sys::child_events().step("signalfd")?;
    let begun = Instant::now();
    let (told, tell) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).step("pipe")?;
    let Some(program) = sys::clone_into(0).step("fork program")? else {
        program::become_program(job, ruleset.as_ref(), &tell);
    };
    drop(tell);
    if let Some(failure) = wait_exec(&told, job, setting) {
        end_tree();
        return Err(failure);
    }
    report::send(&job.channel, &Message::Started);
    Ok(watch(job, setting, &events, program, begun))
}

/// Forget everything inherited from the launcher but what this sandbox was given.
fn drop_descriptors(job: &Job, setting: &Setting) -> Result<(), Failure> {
    // 0 to 2 stay taken, so that nothing opened from here on gets a number the program is given.
    let mut keep: Vec<RawFd> = vec![
        0,
        1,
        2,
        job.channel.as_raw_fd(),
        setting.lifeline.as_raw_fd(),
    ];
    keep.extend(job.stdio.iter().map(AsRawFd::as_raw_fd));
    keep.extend(job.extra.iter().map(AsRawFd::as_raw_fd));
    keep.extend(setting.mapping.iter().map(AsRawFd::as_raw_fd));
    sys::close_all_but(&keep).step("close inherited descriptors")?;
    let taken = 3 + RawFd::try_from(job.extra.len()).unwrap_or(RawFd::MAX);
    while sys::lift(0, 3).step("reserve descriptor")? < taken {}
    Ok(())
}

fn build_walls(job: &Job, setting: &Setting) -> Result<Option<RulesetCreated>, Failure> {
    let request = &job.request;
    let has = |layer| request.layers.contains(&layer);
    let namespaces = has(Layer::Namespaces);
    if namespaces && !setting.as_root {
        identity::map_self(&request.identity)?;
    }
    for procs in &request.cgroups {
        join_cgroup(procs)?;
    }
    if namespaces {
        sys::unshare(libc::CLONE_NEWCGROUP).step("cgroup namespace")?;
        root::enter(&request.mounts, setting.mapping.as_ref().map(AsFd::as_fd))?;
        rustix::system::sethostname(b"safeconduct").step("sethostname")?;
    }
    if setting.as_root {
        if has(Layer::Capabilities) && !namespaces {
            // Only root may; a user namespace made below would bring a full set of its own.
            sys::drop_bounding_set().step("bounding set")?;
        }
        identity::switch(&request.identity)?;
        if namespaces {
            sys::unshare(libc::CLONE_NEWUSER).step("user namespace")?;
            identity::map_self(&request.identity)?;
        }
    }
    let ruleset = has(Layer::Landlock)
        .then(|| confine::ruleset(&request.landlock))
        .transpose()?;
    identity::renounce(has(Layer::Capabilities))?;
    if namespaces {
        // Credential changes clear it, so it is set last, prctl(2) PR_SET_PDEATHSIG.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("pdeathsig")?;
    } else {
        // Without a pid namespace the tree is held by adoption and by a Landlock signal scope:
        // this process joins the outer domain, the program gets a second one nested in it, so
        // that we can signal the program and the program cannot signal us.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).step("subreaper")?;
        if let Some(ruleset) = &ruleset {
            confine::restrict(ruleset)?;
        }
    }
    Ok(ruleset)
}

fn join_cgroup(procs: &OsStr) -> Result<(), Failure> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(procs, flags, Mode::empty()).step_on("open", procs)?;
    // "0" is the writing process, whatever its pid namespace calls it, cgroups(7).
    rustix::io::write(&file, b"0").step_on("join", procs)?;
    Ok(())
}

/// Wait for execve(2): its success closes the pipe without a word. `None` is success.
fn wait_exec(told: &OwnedFd, job: &Job, setting: &Setting) -> Option<Failure> {
    let mut polled = [
        PollFd::new(told, PollFlags::IN),
        PollFd::new(&job.channel, PollFlags::IN),
        PollFd::new(&setting.lifeline, PollFlags::IN),
    ];
    let timeout = Timespec::try_from(EXEC_TIMEOUT).ok();
    match rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, timeout.as_ref())) {
        Ok(_) if !polled[0].revents().is_empty() => {}
        // A file system that does not answer, or nobody waits for this call any more.
        Ok(_) => return Some(Failure::new("wait for exec", Errno::TIMEDOUT)),
        Err(errno) => return Some(Failure::new("wait for exec", errno)),
    }
    let mut bytes = [0_u8; 8192];
    match rustix::io::retry_on_intr(|| rustix::io::read(told, &mut bytes)) {
        Ok(0) => None,
        Ok(count) => Some(
            serde_json::from_slice(&bytes[..count])
                .map(|(step, errno)| Failure { step, errno })
                .unwrap_or(Failure::protocol("unreadable reason")),
        ),
        Err(errno) => Some(Failure::new("wait for exec", errno)),
    }
}

/// Watch the program until it ends, time is up, or supervisor or launcher are gone.
fn watch(job: &Job, setting: &Setting, events: &OwnedFd, program: i32, begun: Instant) -> Exit {
    let deadline = begun + Duration::from_millis(job.request.wall_ms.min(WALL_MS_MAX));
    let mut exit = Exit::default();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        let mut polled = [
            PollFd::new(events, PollFlags::IN),
            PollFd::new(&job.channel, PollFlags::IN),
            PollFd::new(&setting.lifeline, PollFlags::IN),
        ];
        let ready = rustix::event::poll(&mut polled, timeout.as_ref());
        let gone = !polled[1].revents().is_empty() || !polled[2].revents().is_empty();
        drain(events);
        if let Some(status) = reap(program) {
            (exit.code, exit.signal) = status;
            break;
        }
        exit.wall_limit = ready == Ok(0);
        if exit.wall_limit || gone {
            break;
        }
    }
    end_tree();
    (exit.cpu_us, exit.peak_rss_kib) = sys::children_usage();
    exit.wall_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    exit
}

fn drain(events: &OwnedFd) {
    let mut buffer = [0_u8; 1024];
    while rustix::io::read(events, &mut buffer).is_ok() {}
}

type Status = (Option<i32>, Option<i32>);

/// Collect every dead child; say how `program` ended once it is among them.
fn reap(program: i32) -> Option<Status> {
    let mut ended = None;
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        if pid.as_raw_nonzero().get() == program {
            ended = Some((status.exit_status(), status.terminating_signal()));
        }
    }
    ended
}

/// Kill all that is left and wait until the kernel says there are no children.
fn end_tree() {
    loop {
        sys::kill_everything();
        match rustix::process::wait(WaitOptions::empty()) {
            Err(Errno::CHILD) => return,
            _ => continue,
        }
    }
}

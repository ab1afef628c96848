//! Step "program": the stub of a sandbox takes the last steps of confinement, in the order `init.rs`
//! names, waits to be told its program, and becomes it.
//!
//! INVARIANT: it shares the memory of its suspended parent; it only ever ends by execve(2) or
//! `_exit(2)`.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::Signal;
use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec};

use crate::init::Sandbox;
use crate::report::{self, Failure, Message, Step};
use crate::request::{self, Layer, Rlimit, Run, Text, WALL_MS_MAX};
use crate::{confine, receive, root, sys};

/// Numbers from here on are out of the way of the descriptors a program is given.
const DESCRIPTORS_ABOVE: RawFd = 128;
/// LIMIT: the highest descriptor a program is given.
const DESCRIPTOR_MAX: i32 = 64;

/// Run as the stub. Never returns; tells the channel why there is no program.
pub fn run(sandbox: &Sandbox) -> ! {
    let failure = match become_program(sandbox) {
        Ok(failure) | Err(failure) => failure,
    };
    report::send(&sandbox.birth.channel, &Message::Failed(&failure));
    sys::leave(127)
}

fn become_program(sandbox: &Sandbox) -> Result<Failure, Failure> {
    let (template, birth) = (sandbox.template, sandbox.birth);
    let plan = template.plan;
    // In no pid namespace nothing else would end us with init.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("pdeathsig")?;
    rustix::process::setsid().step("setsid")?;
    sys::unblock_signals().step("unblock signals")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let (channel, timer) = (lift(&birth.channel)?, lift(&sandbox.timer)?);
    let lifeline = lift(&template.lifeline)?;
    let standard = [&birth.null, &birth.stdout, &birth.stderr].map(lift);
    for (target, fd) in (0..).zip(standard) {
        sys::place(fd?.as_raw_fd(), target).step("place descriptor")?;
    }
    confine::limits(&plan.rlimits, false)?;
    if let Some(ruleset) = &sandbox.ruleset {
        sys::restrict(ruleset.as_fd()).step("landlock")?;
    }
    if plan.has(Layer::Seccomp) {
        let listener = sys::load_filter(&template.filter, plan.explain).step("seccomp")?;
        if let Some(listener) = listener {
            report::send_with(&channel, &Message::Listener, &[listener.as_fd()]);
        }
    }
    let Some((inline, mut descriptors)) = wait(&channel, &lifeline)? else {
        sys::leave(0);
    };
    let run: Run = request::document(&inline, &mut descriptors)?;
    root::standing(plan.mounts.iter().chain(&sandbox.late)).map_err(Failure::or_stale)?;
    place_descriptors(&run, descriptors)?;
    execute(&run, &timer, &plan.rlimits)
}

type Datagram = (Vec<u8>, Vec<OwnedFd>);

/// Wait to be told the program; `None` where the supervisor is gone.
fn wait(channel: &OwnedFd, lifeline: &OwnedFd) -> Result<Option<Datagram>, Failure> {
    let mut polled = [PollFd::new(channel, PollFlags::IN), PollFd::new(lifeline, PollFlags::IN)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None)).step("wait")?;
    if !polled[1].revents().is_empty() {
        // It may have been told at this very moment, and is not to pass for a program that ran.
        let lost = Failure::new("template", Errno::CHILD);
        return Err(Failure { stale: true, ..lost });
    }
    receive::datagram(channel)
}

/// Become the program. Returns only the reason why not.
fn execute(run: &Run, timer: &OwnedFd, rlimits: &[Rlimit]) -> Result<Failure, Failure> {
    // Whatever it leads to lies in the sandbox: its walls stand already.
    rustix::process::chdir(&*run.cwd).step_on("cwd", &*run.cwd)?;
    let argv = c_strings(run.argv.iter().map(|text| text.as_bytes().to_vec()))?;
    let environment = c_strings(run.environment.iter().map(|text| text.as_bytes().to_vec()))?;
    let Some(program) = run.argv.first() else {
        return Err(Failure::protocol("empty argv"));
    };
    let candidates = c_strings(candidates(program, &run.search))?;
    confine::limits(&run.rlimits, false)?;
    arm(timer, run.wall_ms)?;
    confine::limits(rlimits, true)?;
    confine::limits(&run.rlimits, true)?;
    let mut reason = Errno::NOENT;
    for candidate in &candidates {
        match sys::exec(candidate, &argv, &environment) {
            Errno::NOENT | Errno::NOTDIR => {}
            errno => reason = errno,
        }
    }
    Ok(Failure::new("exec", reason))
}

/// Copy a descriptor to a number that no program is given, close-on-exec.
fn lift(fd: &OwnedFd) -> Result<OwnedFd, Failure> {
    rustix::io::fcntl_dupfd_cloexec(fd, DESCRIPTORS_ABOVE).step("lift descriptor")
}

/// Make what came along 0, 1, 2, 3…; nothing else survives execve(2).
fn place_descriptors(run: &Run, descriptors: Vec<OwnedFd>) -> Result<(), Failure> {
    if run.descriptors.len() != descriptors.len() {
        return Err(Failure::protocol("not the descriptors that were announced"));
    }
    // Lifted first, so that placing one never overwrites another that is still needed.
    let lifted = descriptors.iter().map(lift).collect::<Result<Vec<_>, _>>()?;
    drop(descriptors);
    for (target, fd) in run.descriptors.iter().zip(lifted) {
        match *target {
            // Left open on purpose: closed by execve(2) or by our end, whichever comes.
            -1 => std::mem::forget(fd),
            0..=DESCRIPTOR_MAX => {
                sys::place(fd.as_raw_fd(), *target).step("place descriptor")?;
            }
            _ => return Err(Failure::protocol("descriptor number")),
        }
    }
    Ok(())
}

/// Start the wall limit's clock, which init watches. It goes on after the limit, so that init
/// can read how long the program ran.
fn arm(timer: &OwnedFd, wall_ms: u64) -> Result<(), Failure> {
    let wall_ms = i64::try_from(wall_ms.clamp(1, WALL_MS_MAX)).unwrap_or(i64::MAX);
    let wall = Timespec { tv_sec: wall_ms / 1000, tv_nsec: wall_ms % 1000 * 1_000_000 };
    let limit = Itimerspec { it_interval: wall, it_value: wall };
    rustix::time::timerfd_settime(timer, TimerfdTimerFlags::empty(), &limit)
        .step("wall limit")
        .map(drop)
}

/// How long the program has been running, in µs, by the clock that `arm` started.
pub fn running_us(timer: &OwnedFd) -> u64 {
    let Ok(now) = rustix::time::timerfd_gettime(timer) else {
        return 0;
    };
    let micros = |time: Timespec| (time.tv_sec * 1_000_000 + time.tv_nsec / 1000).unsigned_abs();
    let mut expired = [0_u8; 8];
    let rounds = match rustix::io::read(timer, &mut expired) {
        Ok(8) => u64::from_ne_bytes(expired),
        _ => 0,
    };
    let wall = micros(now.it_interval);
    (wall * (rounds + 1)).saturating_sub(micros(now.it_value))
}

fn c_strings(list: impl IntoIterator<Item = Vec<u8>>) -> Result<Vec<CString>, Failure> {
    list.into_iter()
        .map(|bytes| CString::new(bytes).map_err(|_| Failure::protocol("NUL in text")))
        .collect()
}

fn candidates(program: &OsStr, search: &[Text]) -> Vec<Vec<u8>> {
    let program = program.as_bytes();
    if program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    search.iter().map(|folder| [folder.as_bytes(), program].join(&b'/')).collect()
}

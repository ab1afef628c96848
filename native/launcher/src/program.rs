//! Step "program": the forked child of a sandbox's init takes the last steps of confinement, in the
//! order `init.rs` names, and becomes the program.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use landlock::RulesetCreated;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Signal;

use crate::report::{Failure, Step};
use crate::request::{Job, Layer, Text};
use crate::{confine, sys};

/// Numbers from here on are out of the way of the descriptors a program is given.
const DESCRIPTORS_ABOVE: RawFd = 128;

/// In the forked child: take the last steps and become the program. Tells `tell` why not.
pub fn become_program(job: &Job, ruleset: Option<&RulesetCreated>, tell: &OwnedFd) -> ! {
    let failure = match place_descriptors(job, tell) {
        Ok(tell) => {
            let failure = last_steps(job, ruleset);
            say(&tell, failure);
            sys::leave(127)
        }
        Err(failure) => failure,
    };
    say(tell, failure);
    sys::leave(127)
}

fn say(tell: &OwnedFd, failure: Failure) {
    let bytes = serde_json::to_vec(&(failure.step, failure.errno)).unwrap_or_default();
    let _ = rustix::io::write(tell, &bytes);
}

/// INVARIANT: descriptors are in place. Returns only the reason there is no program.
fn last_steps(job: &Job, ruleset: Option<&RulesetCreated>) -> Failure {
    match confine_and_exec(job, ruleset) {
        Ok(failure) | Err(failure) => failure,
    }
}

fn confine_and_exec(job: &Job, ruleset: Option<&RulesetCreated>) -> Result<Failure, Failure> {
    let request = &job.request;
    if !request.layers.contains(&Layer::Namespaces) {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("pdeathsig")?;
    }
    rustix::process::setsid().step("setsid")?;
    sys::reset_signals().step("reset signals")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    confine::limits(&request.rlimits)?;
    enter_cwd(&request.cwd)?;
    let argv = c_strings(request.argv.iter().map(|text| text.as_bytes().to_vec()))?;
    let environment = c_strings(
        request
            .environment
            .iter()
            .map(|text| text.as_bytes().to_vec()),
    )?;
    let candidates = c_strings(candidates(&request.argv[0], &request.search))?;
    if let Some(ruleset) = ruleset {
        confine::restrict(ruleset)?;
    }
    if request.layers.contains(&Layer::Seccomp) {
        sys::load_filter(&job.filter).step("seccomp")?;
    }
    let mut reason = Errno::NOENT;
    for candidate in &candidates {
        match sys::exec(candidate, &argv, &environment) {
            Errno::NOENT | Errno::NOTDIR => {}
            errno => reason = errno,
        }
    }
    Ok(Failure::new("exec", reason))
}

/// Enter the working folder without following links out of what was judged.
fn enter_cwd(cwd: &OsStr) -> Result<(), Failure> {
    use rustix::fs::{ResolveFlags, CWD};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let folder =
        rustix::fs::openat2(CWD, cwd, flags, Mode::empty(), resolve).step_on("cwd", cwd)?;
    rustix::process::fchdir(folder).step_on("cwd", cwd)
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
    search
        .iter()
        .map(|folder| [folder.as_bytes(), program].join(&b'/'))
        .collect()
}

/// stdin, stdout, stderr and the extra descriptors become 0, 1, 2, 3…; nothing else survives
/// execve(2). Returns `tell` under a number that is out of their way.
fn place_descriptors(job: &Job, tell: &OwnedFd) -> Result<OwnedFd, Failure> {
    let given = job.stdio.iter().chain(&job.extra).map(AsRawFd::as_raw_fd);
    // Lifted first, so that placing one never overwrites another that is still needed.
    let lifted = given
        .map(|fd| sys::lift(fd, DESCRIPTORS_ABOVE).step("lift descriptor"))
        .collect::<Result<Vec<_>, _>>()?;
    let tell = rustix::io::fcntl_dupfd_cloexec(tell, DESCRIPTORS_ABOVE).step("lift descriptor")?;
    for (target, fd) in (0..).zip(lifted) {
        sys::place(fd, target).step("place descriptor")?;
    }
    Ok(tell)
}

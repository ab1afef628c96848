//! Step "confine": Landlock rules and resource limits; seccomp goes last, in `init.rs`.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;

use landlock::{
    Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, Scope, ABI,
};
use rustix::fs::{Mode, OFlags, ResolveFlags, CWD};
use rustix::io::Errno;

use crate::report::{Failure, Step};
use crate::request::{Access, Rlimit, RlimitName, Rule};
use crate::sys;

/// The newest ABI whose rights we know; an older kernel gets the subset it has. The supervisor
/// has compared the kernel's ABI (told in `Hello`) with what the tier requires beforehand.
const KNOWN: ABI = ABI::V6;

/// Build the ruleset: everything is denied but the listed paths; no TCP; no abstract sockets or
/// signals across the border.
pub fn ruleset(rules: &[Rule]) -> Result<RulesetCreated, Failure> {
    let mut created = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(KNOWN)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(KNOWN)))
        .and_then(Ruleset::create)
        .map_err(refused)?;
    for rule in rules {
        let (object, folder) = open(&rule.path)?;
        let mut rights = rights(rule.access);
        if !folder {
            rights &= AccessFs::from_file(KNOWN);
        }
        created = created
            .add_rule(PathBeneath::new(object, rights))
            .map_err(refused)?;
    }
    Ok(created)
}

fn rights(access: Access) -> BitFlags<AccessFs> {
    match access {
        Access::Read => AccessFs::from_read(KNOWN),
        Access::Write => {
            AccessFs::from_all(KNOWN)
                & !(AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev)
        }
        Access::List => AccessFs::ReadDir.into(),
        Access::Device => AccessFs::ReadFile | AccessFs::WriteFile,
    }
}

fn open(path: &OsStr) -> Result<(OwnedFd, bool), Failure> {
    // Without O_NOFOLLOW: together with O_PATH it would open a link as itself, openat2(2).
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let object = rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve)
        .step_on("open for landlock", path)?;
    let mode = rustix::fs::fstat(&object).step_on("stat", path)?.st_mode;
    let folder = rustix::fs::FileType::from_raw_mode(mode) == rustix::fs::FileType::Directory;
    Ok((object, folder))
}

/// Restrict this process and its children. Can be stacked: each layer only takes away.
pub fn restrict(ruleset: &RulesetCreated) -> Result<(), Failure> {
    let copy = ruleset
        .try_clone()
        .map_err(|_| Failure::new("copy landlock ruleset", Errno::MFILE))?;
    let status = copy.restrict_self().map_err(refused)?;
    if status.ruleset == landlock::RulesetStatus::NotEnforced {
        return Err(Failure::new("landlock not enforced", Errno::OPNOTSUPP));
    }
    Ok(())
}

fn refused(error: impl std::fmt::Display) -> Failure {
    Failure::new(format!("landlock: {error}"), Errno::INVAL)
}

pub fn limits(limits: &[Rlimit]) -> Result<(), Failure> {
    for bound in limits {
        let resource = match bound.name {
            RlimitName::Core => libc::RLIMIT_CORE,
            RlimitName::Cpu => libc::RLIMIT_CPU,
            RlimitName::Data => libc::RLIMIT_DATA,
            RlimitName::Fsize => libc::RLIMIT_FSIZE,
            RlimitName::Memlock => libc::RLIMIT_MEMLOCK,
            RlimitName::Msgqueue => libc::RLIMIT_MSGQUEUE,
            RlimitName::Nice => libc::RLIMIT_NICE,
            RlimitName::Nofile => libc::RLIMIT_NOFILE,
            RlimitName::Nproc => libc::RLIMIT_NPROC,
            RlimitName::Rtprio => libc::RLIMIT_RTPRIO,
            RlimitName::Sigpending => libc::RLIMIT_SIGPENDING,
        };
        sys::limit(resource, bound.value).step_on("rlimit", format!("{:?}", bound.name))?;
    }
    Ok(())
}

//! Step "confine": Landlock rules and resource limits; seccomp goes last, in `program.rs`.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use landlock::{
    Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr,
    Scope, ABI,
};
use rustix::fs::{Mode, OFlags, ResolveFlags, CWD};
use rustix::io::Errno;

use crate::report::{Failure, Step};
use crate::request::{Access, Rlimit, RlimitName, Rule};
use crate::{site, sys};

/// The newest ABI whose rights we know; an older kernel gets the subset it has. The supervisor
/// has compared the kernel's ABI (told in `Hello`) with what the tier requires beforehand.
const KNOWN: ABI = ABI::V6;

/// The rules of a plan, their objects opened as far as all of its sandboxes share them.
pub struct Rules<'a> {
    rules: &'a [Rule],
    opened: Vec<Option<(OwnedFd, bool)>>,
    /// What this kernel's Landlock knows: a ruleset handles nothing else.
    known: BitFlags<AccessFs>,
}

impl<'a> Rules<'a> {
    /// Open what does not lie in one of the `private` places.
    pub fn open(rules: &'a [Rule], private: &[OsString]) -> Result<Self, Failure> {
        let shared = |rule: &Rule| !private.iter().any(|place| site::inside(&rule.path, place));
        let opened = rules
            .iter()
            .map(|rule| shared(rule).then(|| open(&rule.path)).transpose())
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            rules,
            opened,
            known: AccessFs::from_all(ABI::from(sys::landlock_abi()).min(KNOWN)),
        })
    }

    /// The descriptors it works with.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let opened = self.opened.iter().flatten();
        opened.map(|(object, _)| object.as_raw_fd())
    }

    /// Build the ruleset of one sandbox: everything is denied but the rules and what lies in
    /// `scratch`; no TCP; no abstract sockets or signals across the border.
    pub fn ruleset(&self, scratch: Option<&OwnedFd>) -> Result<OwnedFd, Failure> {
        let created: Option<OwnedFd> = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(KNOWN))
            .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(KNOWN)))
            .and_then(|ruleset| ruleset.scope(Scope::from_all(KNOWN)))
            .and_then(Ruleset::create)
            .map_err(|error| Failure::new(format!("landlock: {error}"), Errno::INVAL))?
            .into();
        let created = created.ok_or(Failure::new("landlock not enforced", Errno::OPNOTSUPP))?;
        for (rule, opened) in self.rules.iter().zip(&self.opened) {
            match opened {
                Some((object, folder)) => self.add(&created, object, *folder, rule.access)?,
                None => self.add_rule(&created, rule)?,
            }
        }
        if let Some(folder) = scratch {
            self.add(&created, folder, true, Access::Write)?;
        }
        Ok(created)
    }

    /// Add the rules of one call to its ruleset.
    pub fn extend(&self, ruleset: &OwnedFd, late: &[Rule]) -> Result<(), Failure> {
        late.iter().try_for_each(|rule| self.add_rule(ruleset, rule))
    }

    fn add_rule(&self, ruleset: &OwnedFd, rule: &Rule) -> Result<(), Failure> {
        let (object, folder) = open(&rule.path)?;
        self.add(ruleset, &object, folder, rule.access)
    }

    /// The crate's own `add_rule` looks at each object again: half of the time of a ruleset.
    fn add(
        &self,
        ruleset: &OwnedFd,
        object: &OwnedFd,
        folder: bool,
        access: Access,
    ) -> Result<(), Failure> {
        let mut rights = rights(access) & self.known;
        if !folder {
            rights &= AccessFs::from_file(KNOWN);
        }
        sys::allow_beneath(ruleset.as_fd(), object.as_fd(), rights.bits()).step("landlock rule")
    }
}

fn rights(access: Access) -> BitFlags<AccessFs> {
    match access {
        Access::Read => AccessFs::from_read(KNOWN),
        Access::Use => AccessFs::from_read(KNOWN) & !AccessFs::ReadDir,
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

/// Bound the resources of this process and its children, except the number of descriptors where
/// `descriptors` says that they are not in place yet.
pub fn limits(limits: &[Rlimit], descriptors: bool) -> Result<(), Failure> {
    let is_files = |bound: &&Rlimit| bound.name == RlimitName::Nofile;
    for bound in limits.iter().filter(|bound| is_files(bound) == descriptors) {
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

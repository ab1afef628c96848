//! Step "account": the cgroups of one sandbox, made before it, read and removed after it.
//!
//! Sources: cgroups(7), the kernel's admin-guide for cgroup v1 and v2.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Access, AtFlags, Mode, OFlags, CWD};
use rustix::io::Errno;

use crate::report::{Failure, Step};
use crate::request::Group;

/// LIMIT: bytes of one account that are reported.
const ACCOUNT_BYTES_MAX: usize = 4096;

/// Folders of the host's cgroup hierarchies, opened while they can be reached.
pub struct Hierarchies<'a> {
    groups: &'a [Group],
    bases: Vec<OwnedFd>,
    /// Version 2: a child can be born in its cgroup.
    unified: bool,
}

/// The cgroups of one sandbox.
pub struct Cgroups {
    name: String,
    pub folders: Vec<OwnedFd>,
    unified: bool,
}

impl<'a> Hierarchies<'a> {
    pub fn open(groups: &'a [Group]) -> Result<Self, Failure> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let bases = groups
            .iter()
            .map(|group| {
                rustix::fs::open(&*group.base, flags, Mode::empty())
                    .step_on("open cgroup", &*group.base)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let unified = bases.first().is_some_and(|base| {
            let file = "cgroup.controllers";
            rustix::fs::accessat(base, file, Access::EXISTS, AtFlags::empty()).is_ok()
        });
        Ok(Self { groups, bases, unified })
    }

    /// Make the cgroups of one sandbox with their limits set.
    pub fn make(&self, name: &str) -> Result<Cgroups, Failure> {
        let mut made =
            Cgroups { name: name.to_owned(), folders: Vec::new(), unified: self.unified };
        for (group, base) in self.groups.iter().zip(&self.bases) {
            match make_one(group, base, name) {
                Ok(folder) => made.folders.push(folder),
                Err(failure) => {
                    drop(made);
                    self.remove(name);
                    return Err(failure);
                }
            }
        }
        Ok(made)
    }

    /// Remove the cgroups of a sandbox; false while a process is still leaving.
    pub fn remove(&self, name: &str) -> bool {
        self.bases
            .iter()
            .map(|base| rustix::fs::unlinkat(base, name, AtFlags::REMOVEDIR))
            .all(|removed| matches!(removed, Ok(()) | Err(Errno::NOENT)))
    }
}

fn make_one(group: &Group, base: &OwnedFd, name: &str) -> Result<OwnedFd, Failure> {
    rustix::fs::mkdirat(base, name, Mode::from_raw_mode(0o755))
        .step_on("make cgroup in", &*group.base)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(base, name, flags, Mode::empty())
        .step_on("open cgroup in", &*group.base)?;
    for (file, value, required) in &group.settings {
        match write(folder.as_fd(), file, value) {
            Err(Errno::NOENT) if !required => {}
            written => written.step_on("cgroup limit", file)?,
        }
    }
    Ok(folder)
}

impl Cgroups {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where a child is to be born; `None` where it has to join by itself.
    pub fn birthplace(&self) -> Option<BorrowedFd<'_>> {
        self.folders.first().filter(|_| self.unified).map(AsFd::as_fd)
    }

    /// Join by writing, unless we were born in it: `cgroup.procs` waits, and has every fork of the
    /// machine wait, for all that fork now. A thread that moves itself does not, which version 1
    /// alone can do (`cgroup_procs_write_start` in the kernel's kernel/cgroup/cgroup.c).
    pub fn join(&self) -> Result<(), Failure> {
        let file = if self.unified { "cgroup.procs" } else { "tasks" };
        for folder in self.folders.iter().filter(|folder| !(self.unified && populated(folder))) {
            // "0" is whoever writes, whatever its pid namespace calls it, cgroups(7).
            write(folder.as_fd(), file, "0").step("join cgroup")?;
        }
        Ok(())
    }

    /// Open what will be read in the end; afterwards the hierarchy is out of reach.
    pub fn accounts(&self, groups: &[Group]) -> Vec<Option<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let open = |folder: &OwnedFd, file: &String| {
            rustix::fs::openat(folder, file.as_str(), flags, Mode::empty()).ok()
        };
        groups
            .iter()
            .zip(&self.folders)
            .flat_map(|(group, folder)| group.accounts.iter().map(move |file| (folder, file)))
            .map(|(folder, file)| open(folder, file))
            .collect()
    }
}

/// Read the accounts; an unreadable one is empty.
pub fn read(accounts: &[Option<OwnedFd>]) -> Vec<String> {
    let read_one = |file: &Option<OwnedFd>| {
        let mut bytes = [0_u8; ACCOUNT_BYTES_MAX];
        let count = rustix::io::pread(file.as_ref()?, &mut bytes, 0).ok()?;
        String::from_utf8(bytes[..count].to_vec()).ok()
    };
    accounts.iter().map(|file| read_one(file).unwrap_or_default()).collect()
}

/// Tell whether a new cgroup of version 2 has a process: the one that was born there.
fn populated(folder: &OwnedFd) -> bool {
    let file = rustix::fs::openat(folder, "cgroup.procs", OFlags::CLOEXEC, Mode::empty());
    file.and_then(|file| rustix::io::read(file, &mut [0_u8; 1])).is_ok_and(|count| count > 0)
}

fn write(folder: BorrowedFd, file: &str, text: &str) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, file, flags, Mode::empty())?;
    rustix::io::write(file, text.as_bytes()).map(drop)
}

/// Open a folder of the host that is needed after the root has been left.
pub fn open_folder(path: &std::ffi::OsStr) -> Result<OwnedFd, Failure> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty()).step_on("open", path)
}

//! Step "root": a root file system under construction, and what each kind of mount puts into it.
//!
//! Sources and targets are opened without following any symbolic link: an earlier call may have
//! replaced a granted folder by a link to somewhere else.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{Mode, OFlags, ResolveFlags, CWD};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};

use crate::report::{Failure, Step};
use crate::request::{Mount, Plan};
use crate::{overlay, sys};

/// Sources wait here, by the number of their mount, until a sandbox attaches its own clones.
const STAGE: &str = "/.stage";
const EMPTY: &str = "/.stage/empty";
const NOTHING: &str = "/.stage/nothing";

/// LIMIT: mount points of one call, and the folders around them.
const SHELTER_BYTES: u64 = 1 << 20;
const SHELTER_INODES: u64 = 8192;

/// A root under construction.
pub struct Site {
    pub fd: OwnedFd,
    /// Devices of the file systems made for this sandbox. INVARIANT: names are created on these
    /// alone; elsewhere it would be done on somebody's disk, and with the launcher's rights.
    own: Vec<u64>,
    /// A procfs that was made for this sandbox. Nobody has been in it yet, so its paths lead where
    /// they say.
    proc: Option<OsString>,
}

impl Site {
    pub fn open(fd: OwnedFd) -> Result<Self, Failure> {
        let own = vec![rustix::fs::fstat(&fd).step("stat root")?.st_dev];
        let proc = None;
        Ok(Self { fd, own, proc })
    }

    pub fn here() -> Result<Self, Failure> {
        Self::open(open_path(CWD, "/", ResolveFlags::empty()).step("open root")?)
    }

    /// Take a file system that was made for this sandbox for our own.
    pub fn adopt(&mut self, target: &OsStr) -> Result<(), Failure> {
        let found =
            open_path(self.fd.as_fd(), relative(target), beneath()).step_on("open", target)?;
        let made = rustix::fs::fstat(&found).step_on("stat", target)?;
        self.own.push(made.st_dev);
        Ok(())
    }

    /// Put a small file system of this sandbox's own at `top`, for mount points alone.
    pub fn shelter(&mut self, top: &OsStr) -> Result<OwnedFd, Failure> {
        let tree = scratch(SHELTER_BYTES, SHELTER_INODES, 0o755)?;
        self.put(&tree, top, true)?;
        self.adopt(top)?;
        Ok(tree)
    }

    /// Make the stage, and on it what masks are cloned from.
    pub fn stage(&self, proc: Option<OwnedFd>) -> Result<(), Failure> {
        for (name, mode) in [(STAGE, 0o755), (EMPTY, 0)] {
            rustix::fs::mkdirat(&self.fd, relative(name.as_ref()), Mode::from_raw_mode(mode))
                .step_on("mkdir", name)?;
        }
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDONLY | OFlags::CLOEXEC;
        let path = relative(NOTHING.as_ref());
        rustix::fs::openat(&self.fd, path, flags, Mode::empty()).step_on("create", NOTHING)?;
        for path in [EMPTY, NOTHING] {
            // What a mask is cloned from belongs to an ordinary user's programs too: were it not
            // read-only, they would change its mode and leave in it what the next call finds.
            let source = self.clone_of(path)?;
            sys::mount_setattr(source.as_fd(), false, sys::MOUNT_ATTR_RDONLY, None)
                .step_on("restrict", path)?;
            self.put_on(&source, path.as_ref())?;
        }
        match proc {
            Some(tree) => self.put(&tree, OsStr::new("/.stage/proc"), true),
            None => Ok(()),
        }
    }

    /// Hide the stage from the program for good.
    pub fn cover_stage(&self) -> Result<(), Failure> {
        let empty = self.clone_of(EMPTY)?;
        self.put_on(&empty, STAGE.as_ref())
    }

    pub fn freeze(&self) -> Result<(), Failure> {
        sys::mount_setattr(self.fd.as_fd(), false, sys::MOUNT_ATTR_RDONLY, None)
            .step("read-only root")
    }

    /// Put the source of a private mount on the stage, and make the place it will have.
    pub fn reserve(
        &self,
        number: usize,
        mount: &Mount,
        tree: Option<OwnedFd>,
        private: &[bool],
        plan: &Plan,
    ) -> Result<(), Failure> {
        let mut folder = true;
        if let Some(tree) = tree {
            folder = is_folder(tree.as_fd()).step_on("stat", mount.target())?;
            self.put(&tree, staged(number).as_ref(), folder)?;
        }
        if matches!(mount, Mount::Overlay { .. }) {
            overlay::reserve(self, number)?;
        }
        let covered = plan.mounts[..number]
            .iter()
            .zip(private)
            .any(|(outer, private)| *private && inside(mount.target(), outer.target()));
        let mounted = !matches!(
            mount,
            Mount::Mask { .. } | Mount::Folder { .. } | Mount::Link { .. } | Mount::File { .. }
        );
        if covered || !mounted {
            return Ok(());
        }
        let (parent, name) = self.parent(mount.target())?;
        self.make(&parent, name, folder).step_on("mount point", mount.target())
    }

    /// Take the source of a private mount from the stage; mapped ids need a clone of its own.
    pub fn staged(&self, number: usize, mapping: Option<BorrowedFd>) -> Result<OwnedFd, Failure> {
        let name = staged(number);
        let found = open_path(self.fd.as_fd(), relative(name.as_ref()), beneath())
            .step_on("open", &name)?;
        let tree = clone_at(&found, true).step_on("clone", &name)?;
        if mapping.is_some() {
            sys::mount_setattr(tree.as_fd(), true, 0, mapping).step_on("map ids", &name)?;
        }
        Ok(tree)
    }

    pub fn attach(&mut self, mount: &Mount, tree: Option<OwnedFd>) -> Result<(), Failure> {
        match mount {
            Mount::Bind { target, .. } => {
                let tree = tree.ok_or(Failure::protocol("bind without a source"))?;
                let folder = is_folder(tree.as_fd()).step_on("stat", &**target)?;
                self.put(&tree, target, folder)
            }
            Mount::Overlay { .. } => Err(Failure::protocol("an overlay is nobody's but one's own")),
            Mount::Tmpfs { target, bytes, inodes, mode } => {
                let tree = scratch(*bytes, *inodes, *mode)?;
                self.put(&tree, target, true)?;
                self.adopt(target)
            }
            Mount::Proc { target } => {
                let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
                    | MountAttrFlags::MOUNT_ATTR_NODEV
                    | MountAttrFlags::MOUNT_ATTR_NOEXEC;
                // proc(5): who may not be traced does not show; our own init is such a process.
                let options = [("hidepid", "ptraceable".to_owned())];
                self.put(&fresh("proc", &options, attributes)?, target, true)?;
                self.proc = Some(target.to_os_string());
                Ok(())
            }
            Mount::Mask { target, empty, .. } => match &self.proc {
                Some(proc) if inside(target, proc) => mask_in_proc(target, *empty),
                _ => self.mask(target, *empty),
            },
            Mount::Folder { target } => {
                let (parent, name) = self.parent(target)?;
                self.make(&parent, name, true).step_on("mkdir", &**target)
            }
            Mount::Link { target, to } => {
                let (parent, name) = self.parent(target)?;
                rustix::fs::symlinkat(&**to, parent, name).step_on("symlink", &**target)
            }
            Mount::File { target, text } => {
                let (parent, name) = self.parent(target)?;
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                let file = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o444))
                    .step_on("create", &**target)?;
                rustix::io::write(&file, text.as_bytes()).step_on("write", &**target)?;
                Ok(())
            }
        }
    }

    /// Cover what is at `target` with nothing: a folder that cannot be entered, a file that cannot
    /// be opened, or an `empty` one that can. What this kernel lacks needs no mask.
    fn mask(&self, target: &OsStr, empty: bool) -> Result<(), Failure> {
        let place = match open_path(self.fd.as_fd(), relative(target), beneath()) {
            Err(Errno::NOENT) => return Ok(()),
            found => found.step_on("open", target)?,
        };
        let folder = is_folder(place.as_fd()).step_on("stat", target)?;
        let nothing = self.clone_of(what_hides(folder, empty))?;
        move_onto(&nothing, &place).step_on("mask", target)
    }

    fn clone_of(&self, path: &str) -> Result<OwnedFd, Failure> {
        let found =
            open_path(self.fd.as_fd(), relative(path.as_ref()), beneath()).step_on("open", path)?;
        clone_at(&found, false).step_on("clone", path)
    }

    /// Attach a detached mount at `target`, making the mount point where our own root needs one.
    pub fn put(&self, tree: &OwnedFd, target: &OsStr, folder: bool) -> Result<(), Failure> {
        let (parent, name) = self.parent(target)?;
        self.make(&parent, name, folder).step_on("mount point", target)?;
        self.put_on(tree, target)
    }

    fn put_on(&self, tree: &OwnedFd, target: &OsStr) -> Result<(), Failure> {
        let place =
            open_path(self.fd.as_fd(), relative(target), beneath()).step_on("open", target)?;
        move_onto(tree, &place).step_on("attach", target)
    }

    /// Open the folder that holds `target`, making missing ones, and name the last component.
    fn parent<'a>(&self, target: &'a OsStr) -> Result<(OwnedFd, &'a OsStr), Failure> {
        let path = relative(target).as_bytes();
        let cut = path.iter().rposition(|byte| *byte == b'/');
        let (folders, name) = cut.map_or((&path[..0], path), |at| (&path[..at], &path[at + 1..]));
        let name = OsStr::from_bytes(name);
        if let Ok(found) = open_path(
            self.fd.as_fd(),
            if folders.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(folders) },
            beneath(),
        ) {
            return Ok((found, name));
        }
        let mut current = open_path(self.fd.as_fd(), ".", beneath()).step_on("open", target)?;
        for folder in folders.split(|byte| *byte == b'/') {
            if folder.is_empty() {
                continue;
            }
            let folder = OsStr::from_bytes(folder);
            self.make(&current, folder, true).step_on("mkdir for", target)?;
            current = open_path(current.as_fd(), folder, beneath()).step_on("open", target)?;
        }
        Ok((current, name))
    }

    /// Make an empty folder or file, unless it is there or would be on a file system not ours.
    pub fn make(&self, parent: &OwnedFd, name: &OsStr, folder: bool) -> Result<(), Errno> {
        if !self.own.contains(&rustix::fs::fstat(parent)?.st_dev) {
            return Ok(());
        }
        let made = if folder {
            rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o444)).map(drop)
        };
        match made {
            Err(Errno::EXIST) => Ok(()),
            made => made,
        }
    }
}

/// Name the folder of the root that holds `path`, or is it.
pub fn top(path: &OsStr) -> &OsStr {
    let bytes = path.as_bytes();
    let end = bytes.iter().skip(1).position(|byte| *byte == b'/');
    OsStr::from_bytes(&bytes[..end.map_or(bytes.len(), |end| end + 1)])
}

pub fn inside(path: &OsStr, folder: &OsStr) -> bool {
    let rest = path.as_bytes().strip_prefix(folder.as_bytes());
    rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

/// Clone the source of a mount, detached, with its final attributes.
pub fn prepare(mount: &Mount) -> Result<Option<OwnedFd>, Failure> {
    let (source, write, device) = match mount {
        Mount::Bind { source, write, device, .. } => (source, *write, *device),
        Mount::Overlay { source, .. } => (source, false, false),
        _ => return Ok(None),
    };
    let tree = clone_tree(source, true)?;
    let mut attributes = sys::MOUNT_ATTR_NOSUID;
    if !write {
        attributes |= sys::MOUNT_ATTR_RDONLY;
    }
    if !device {
        attributes |= sys::MOUNT_ATTR_NODEV;
    }
    sys::mount_setattr(tree.as_fd(), true, attributes, None).step_on("restrict", &**source)?;
    Ok(Some(tree))
}

pub fn clone_tree(source: &OsStr, recursive: bool) -> Result<OwnedFd, Failure> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let found = open_path(CWD, source, resolve).step_on("open", source)?;
    clone_at(&found, recursive).step_on("clone", source)
}

fn clone_at(found: &OwnedFd, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(found.as_fd(), "", flags)
}

/// The same as `Site::mask` with fewer system calls. One that fails would wait until every
/// processor has seen it, namespace_unlock() in the kernel's fs/namespace.c.
fn mask_in_proc(target: &OsStr, empty: bool) -> Result<(), Failure> {
    let found = match rustix::fs::stat(target) {
        Err(Errno::NOENT) => return Ok(()),
        found => found.step_on("stat", target)?,
    };
    let nothing = what_hides(is_directory(&found), empty);
    rustix::mount::mount_bind(nothing, target).step_on("mask", target)
}

fn what_hides(folder: bool, empty: bool) -> &'static str {
    match (folder, empty) {
        (true, _) => EMPTY,
        (false, false) => NOTHING,
        (false, true) => "/dev/null",
    }
}

/// Where the source of a mount waits.
pub fn staged(number: usize) -> String {
    format!("{STAGE}/{number}")
}

fn move_onto(tree: &OwnedFd, place: &OwnedFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree.as_fd(), "", place.as_fd(), "", flags)
}

/// A new private tmpfs.
pub fn scratch(bytes: u64, inodes: u64, mode: u32) -> Result<OwnedFd, Failure> {
    // tmpfs(5): 0 would mean no limit at all.
    let options = [
        ("size", bytes.max(1).to_string()),
        ("nr_inodes", inodes.max(1).to_string()),
        ("mode", format!("{mode:o}")),
    ];
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    fresh("tmpfs", &options, attributes)
}

/// A new instance of a file system, not yet visible anywhere, fsopen(2).
pub fn fresh(
    kind: &str,
    options: &[(&str, String)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Failure> {
    let context =
        rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).step_on("fsopen", kind)?;
    for (key, value) in options {
        let set = if value.is_empty() {
            rustix::mount::fsconfig_set_flag(context.as_fd(), *key)
        } else {
            rustix::mount::fsconfig_set_string(context.as_fd(), *key, value.as_str())
        };
        set.step_on("configure", key)?;
    }
    rustix::mount::fsconfig_create(context.as_fd()).step_on("create", kind)?;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .step_on("mount", kind)
}

pub fn relative(target: &OsStr) -> &OsStr {
    let bytes = target.as_bytes();
    let slashes = bytes.iter().take_while(|byte| **byte == b'/').count();
    OsStr::from_bytes(&bytes[slashes..])
}

pub fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// Open a path without any access to its content, openat2(2).
pub fn open_path(
    at: BorrowedFd,
    path: impl AsRef<OsStr>,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    // Without O_NOFOLLOW: together with O_PATH it would open a link as itself, openat2(2).
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(at, path.as_ref(), flags, Mode::empty(), resolve)
}

fn is_folder(fd: BorrowedFd) -> Result<bool, Errno> {
    rustix::fs::fstat(fd).map(|found| is_directory(&found))
}

fn is_directory(found: &rustix::fs::Stat) -> bool {
    rustix::fs::FileType::from_raw_mode(found.st_mode) == rustix::fs::FileType::Directory
}

//! Step "root": an empty root file system that holds only what the request grants.
//!
//! Sources and targets are opened without following any symbolic link: an earlier call may have
//! replaced a granted folder by a link to somewhere else.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{Mode, OFlags, ResolveFlags, CWD};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::report::{Failure, Step};
use crate::request::Mount;
use crate::sys;

/// Where the new root is put together. It only has to exist; the mount covers it in our own
/// mount namespace, after every source has been opened.
const STAGE: &str = "/tmp";
const STAGE_OPTIONS: &std::ffi::CStr = c"mode=0755,size=1m,nr_inodes=8192";

/// Build the new root and make it ours. The caller is alone in a new mount namespace.
pub fn enter(mounts: &[Mount], mapping: Option<BorrowedFd>) -> Result<(), Failure> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).step("private mounts")?;
    let prepared = mounts
        .iter()
        .map(|mount| prepare(mount, mapping))
        .collect::<Result<Vec<_>, _>>()?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("tmpfs", STAGE, "tmpfs", flags, STAGE_OPTIONS).step("mount root")?;
    let mut root = Root::new(open_path(CWD, STAGE, ResolveFlags::empty()).step("open root")?)?;
    for (mount, tree) in mounts.iter().zip(prepared) {
        root.attach(mount, tree)?;
    }
    let fd = root.fd.as_fd();
    sys::mount_setattr(fd, false, sys::MOUNT_ATTR_RDONLY, None).step("read-only root")?;
    pivot(&root.fd)
}

fn pivot(root: &OwnedFd) -> Result<(), Failure> {
    rustix::process::fchdir(root).step("enter root")?;
    // pivot_root(2), "pivot_root(".", ".")": the old root lies over the new one and is unmounted.
    rustix::process::pivot_root(".", ".").step("pivot_root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).step("leave old root")?;
    rustix::process::chdir("/").step("chdir /")
}

/// Clone the source of a bind mount, detached, with its final attributes.
fn prepare(mount: &Mount, mapping: Option<BorrowedFd>) -> Result<Option<OwnedFd>, Failure> {
    let Mount::Bind {
        source,
        write,
        device,
        mapped,
        ..
    } = mount
    else {
        return Ok(None);
    };
    let found = open_path(
        CWD,
        source,
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
    .step_on("open", source)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(found.as_fd(), "", flags).step_on("clone", source)?;
    let mut attributes = sys::MOUNT_ATTR_NOSUID;
    if !write {
        attributes |= sys::MOUNT_ATTR_RDONLY;
    }
    if !device {
        attributes |= sys::MOUNT_ATTR_NODEV;
    }
    let mapping = mapping.filter(|_| *mapped);
    sys::mount_setattr(tree.as_fd(), true, attributes, mapping).step_on("restrict", source)?;
    Ok(Some(tree))
}

/// The root under construction.
struct Root {
    fd: OwnedFd,
    /// Devices of the file systems made for this sandbox. INVARIANT: names are created on these
    /// alone; elsewhere it would be done on somebody's disk, and with the launcher's rights.
    own: Vec<u64>,
}

impl Root {
    fn new(fd: OwnedFd) -> Result<Self, Failure> {
        let own = vec![rustix::fs::fstat(&fd).step("stat root")?.st_dev];
        Ok(Self { fd, own })
    }

    fn attach(&mut self, mount: &Mount, tree: Option<OwnedFd>) -> Result<(), Failure> {
        match mount {
            Mount::Bind {
                source,
                target,
                optional,
                ..
            } => {
                let tree = tree.ok_or(Failure::protocol("bind without a source"))?;
                let folder = is_folder(tree.as_fd()).step_on("stat", source)?;
                self.put(&tree, target, folder, *optional)
            }
            Mount::Tmpfs {
                target,
                bytes,
                inodes,
                mode,
                write,
                optional,
            } => {
                let options = [
                    ("size", bytes.to_string()),
                    ("nr_inodes", inodes.to_string()),
                    ("mode", format!("{mode:o}")),
                ];
                let attributes =
                    MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
                let tree = fresh("tmpfs", &options, attributes)?;
                self.put(&tree, target, true, *optional)?;
                if !*write {
                    return sys::mount_setattr(tree.as_fd(), false, sys::MOUNT_ATTR_RDONLY, None)
                        .step_on("read-only", target);
                }
                let made = rustix::fs::fstat(&tree).step_on("stat", target)?;
                self.own.push(made.st_dev);
                Ok(())
            }
            Mount::Proc { target } => {
                let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
                    | MountAttrFlags::MOUNT_ATTR_NODEV
                    | MountAttrFlags::MOUNT_ATTR_NOEXEC;
                self.put(&fresh("proc", &[], attributes)?, target, true, false)
            }
            Mount::Folder { target } => {
                let (parent, name) = self.parent(target)?;
                self.make(&parent, name, true).step_on("mkdir", target)
            }
            Mount::Link { target, to } => {
                let (parent, name) = self.parent(target)?;
                rustix::fs::symlinkat(&**to, parent, name).step_on("symlink", target)
            }
            Mount::File { target, text } => {
                let (parent, name) = self.parent(target)?;
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                let file = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o444))
                    .step_on("create", target)?;
                rustix::io::write(&file, text.as_bytes()).step_on("write", target)?;
                Ok(())
            }
        }
    }

    /// Attach a detached mount at `target`, making the mount point where our own root needs one.
    fn put(
        &self,
        tree: &OwnedFd,
        target: &OsStr,
        folder: bool,
        optional: bool,
    ) -> Result<(), Failure> {
        if !optional {
            let (parent, name) = self.parent(target)?;
            self.make(&parent, name, folder)
                .step_on("mount point", target)?;
        }
        let place = match open_path(self.fd.as_fd(), relative(target), beneath()) {
            Err(Errno::NOENT) if optional => return Ok(()),
            found => found.step_on("open", target)?,
        };
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(tree.as_fd(), "", place.as_fd(), "", flags)
            .step_on("attach", target)
    }

    /// Open the folder that holds `target`, making missing ones, and name the last component.
    fn parent<'a>(&self, target: &'a OsStr) -> Result<(OwnedFd, &'a OsStr), Failure> {
        let path = relative(target).as_bytes();
        let cut = path.iter().rposition(|byte| *byte == b'/');
        let (folders, name) = cut.map_or((&path[..0], path), |at| (&path[..at], &path[at + 1..]));
        let mut current = open_path(self.fd.as_fd(), ".", beneath()).step_on("open", target)?;
        for folder in folders.split(|byte| *byte == b'/') {
            if folder.is_empty() {
                continue;
            }
            let folder = OsStr::from_bytes(folder);
            self.make(&current, folder, true)
                .step_on("mkdir for", target)?;
            current = open_path(current.as_fd(), folder, beneath()).step_on("open", target)?;
        }
        Ok((current, OsStr::from_bytes(name)))
    }

    /// Make an empty folder or file, unless it is there or would be on a file system not ours.
    fn make(&self, parent: &OwnedFd, name: &OsStr, folder: bool) -> Result<(), Errno> {
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

/// A new instance of a file system, not yet visible anywhere, fsopen(2).
fn fresh(
    kind: &str,
    options: &[(&str, String)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Failure> {
    let context =
        rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).step_on("fsopen", kind)?;
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(context.as_fd(), *key, value.as_str())
            .step_on("configure", kind)?;
    }
    rustix::mount::fsconfig_create(context.as_fd()).step_on("create", kind)?;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .step_on("mount", kind)
}

fn relative(target: &OsStr) -> &OsStr {
    let bytes = target.as_bytes();
    let slashes = bytes.iter().take_while(|byte| **byte == b'/').count();
    OsStr::from_bytes(&bytes[slashes..])
}

fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// Open a path without any access to its content, openat2(2).
fn open_path(
    at: BorrowedFd,
    path: impl AsRef<OsStr>,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    // Without O_NOFOLLOW: together with O_PATH it would open a link as itself, openat2(2).
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(at, path.as_ref(), flags, Mode::empty(), resolve)
}

fn is_folder(fd: BorrowedFd) -> Result<bool, Errno> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory)
}

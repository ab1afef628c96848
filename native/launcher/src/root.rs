//! Step "root": a root file system that holds only what the plan grants.
//!
//! A template builds it once; each sandbox gets a copy of the mount namespace and finishes what is
//! private to it.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, ResolveFlags, StatxAttributes, StatxFlags, CWD};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::report::{Failure, Step};
use crate::request::{Mount, Plan};
use crate::site::{clone_tree, inside, open_path, prepare, top, Site};
use crate::{account, identity, overlay, sys};

/// Where the new root is put together. It only has to exist; the mount covers it in our own
/// mount namespace, after every source has been opened.
const SITE: &str = "/tmp";
const ROOT_OPTIONS: &std::ffi::CStr = c"mode=0755,size=1m,nr_inodes=8192";

/// Enter a user and a mount namespace of our own, where an ordinary user may mount.
pub fn own_namespaces() -> Result<(), Failure> {
    if identity::is_root() {
        return Ok(());
    }
    let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
    let proc = account::open_folder("/proc".as_ref())?;
    sys::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS).step("clone namespaces")?;
    identity::map_self(&proc, uid.as_raw(), uid.as_raw(), gid.as_raw())?;
    // What the host mounts later is seen here; nothing of ours is seen there.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave).step("private mounts")
}

/// The root of a template, and which of its mounts every sandbox attaches for itself.
pub struct Root {
    private: Vec<bool>,
    targets: Vec<OsString>,
    as_root: bool,
}

impl Root {
    /// Build the new root and make it ours. The caller is alone in a new mount namespace.
    pub fn build(plan: &Plan) -> Result<Self, Failure> {
        let unshared = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", unshared).step("private mounts")?;
        let private = privates(plan);
        let as_root = identity::is_root();
        let sources = plan.mounts.iter().map(prepare).collect::<Result<Vec<_>, _>>()?;
        // An ordinary user may mount procfs only where all of one is in sight,
        // mount_namespaces(7).
        let wanted = plan.mounts.iter().any(|mount| matches!(mount, Mount::Proc { .. }));
        let visible =
            if wanted && !as_root { clone_tree(OsStr::new("/proc"), true).ok() } else { None };
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount("tmpfs", SITE, "tmpfs", flags, ROOT_OPTIONS).step("mount root")?;
        let mut site = Site::open(open_path(CWD, SITE, ResolveFlags::empty()).step("open root")?)?;
        site.stage(visible)?;
        for (number, (mount, tree)) in plan.mounts.iter().zip(sources).enumerate() {
            if private[number] {
                site.reserve(number, mount, tree, &private, plan)?;
            } else {
                site.attach(mount, tree)?;
            }
        }
        if !plan.late {
            site.freeze()?;
        }
        pivot(&site.fd)?;
        Ok(Self { targets: targets(plan, &private), private, as_root })
    }

    /// Paths whose objects differ from sandbox to sandbox.
    pub fn private(&self) -> &[OsString] {
        &self.targets
    }

    /// Attach what is private to one sandbox. The caller is in a copy of the mount namespace.
    pub fn finish(
        &self,
        plan: &Plan,
        mapping: Option<BorrowedFd>,
        channel: BorrowedFd,
    ) -> Result<(), Failure> {
        let mut site = Site::here()?;
        for (number, mount) in plan.mounts.iter().enumerate() {
            if !self.private[number] {
                continue;
            }
            match mount {
                Mount::Bind { mapped, .. } => {
                    let tree = site.staged(number, mapping.filter(|_| *mapped))?;
                    site.attach(mount, Some(tree))?;
                }
                Mount::Overlay { .. } => {
                    let own = overlay::Own { mapping, owner: plan.identity.owner, channel };
                    overlay::attach(&site, number, mount, &own, self.as_root)?;
                }
                _ => site.attach(mount, None)?,
            }
        }
        if plan.late {
            return Ok(());
        }
        site.cover_stage()
    }

    /// Attach the mounts of one call, which somebody else has cloned, and close the root.
    pub fn bind(&self, plan: &Plan, mounts: &[Mount], trees: Vec<OwnedFd>) -> Result<(), Failure> {
        let mut site = Site::here()?;
        for mount in &plan.mounts {
            if let Mount::Tmpfs { target, .. } = mount {
                site.adopt(target)?;
            }
        }
        // The names of what one call is granted must not stay in the root that all share.
        let mut shelters: Vec<(OsString, OwnedFd)> = Vec::new();
        for mount in mounts {
            let target: &OsStr = mount.target();
            let top = top(target);
            let shared = plan.mounts.iter().any(|other| inside(other.target(), top));
            if !shared && top != target && shelters.iter().all(|(made, _)| made != top) {
                shelters.push((top.to_os_string(), site.shelter(top)?));
            }
        }
        let mut trees = trees.into_iter();
        for mount in mounts {
            let tree = match mount {
                Mount::Bind { .. } => trees.next(),
                _ => None,
            };
            site.attach(mount, tree)?;
        }
        site.cover_stage()?;
        for (top, shelter) in &shelters {
            sys::mount_setattr(shelter.as_fd(), false, sys::MOUNT_ATTR_RDONLY, None)
                .step_on("read-only", top)?;
        }
        site.freeze()
    }
}

/// Clone the sources of bind mounts, detached, with their final attributes.
pub fn clone_all(mounts: &[Mount], mapping: Option<BorrowedFd>) -> Result<Vec<OwnedFd>, Failure> {
    let mut trees = Vec::new();
    for mount in mounts {
        if let (Some(tree), Mount::Bind { mapped, source, .. }) = (prepare(mount)?, mount) {
            let mapping = mapping.filter(|_| *mapped);
            if mapping.is_some() {
                sys::mount_setattr(tree.as_fd(), true, 0, mapping).step_on("map ids", &**source)?;
            }
            trees.push(tree);
        }
    }
    Ok(trees)
}

/// Check that what hides and protects is still in place. Whoever removes or replaces a file
/// outside takes away what is mounted on it in every other mount namespace, so a sandbox that
/// waited may show what it was to hide.
pub fn standing<'a>(mounts: impl Iterator<Item = &'a Mount>) -> Result<(), Failure> {
    let as_itself = AtFlags::SYMLINK_NOFOLLOW;
    for mount in mounts {
        let masked = match mount {
            Mount::Mask { held: true, .. } => true,
            Mount::Bind { held: true, .. } => false,
            _ => continue,
        };
        let target = mount.target();
        match rustix::fs::statx(CWD, &**target, as_itself, StatxFlags::empty()) {
            Ok(found) if found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) => {}
            // There is nothing left to hide, or it lies in a folder that is hidden itself.
            Err(Errno::NOENT) if masked => {}
            Err(Errno::ACCESS) => {}
            Ok(_) => return Err(Failure::on("replaced", &**target, Errno::STALE)),
            Err(errno) => return Err(Failure::on("look at", &**target, errno)),
        }
    }
    Ok(())
}

/// Say which bound of a private tmpfs has been reached; an overlay tells of that of its layer.
pub fn full(plan: &Plan) -> Option<&'static str> {
    for mount in &plan.mounts {
        let (Mount::Tmpfs { target, .. } | Mount::Overlay { target, .. }) = mount else {
            continue;
        };
        let Ok(found) = rustix::fs::statfs(&**target) else {
            continue;
        };
        if found.f_bavail == 0 {
            return Some("disk");
        }
        if found.f_ffree == 0 {
            return Some("inodes");
        }
    }
    None
}

fn pivot(root: &OwnedFd) -> Result<(), Failure> {
    rustix::process::fchdir(root).step("enter root")?;
    // pivot_root(2), "pivot_root(".", ".")": the old root lies over the new one and is unmounted.
    rustix::process::pivot_root(".", ".").step("pivot_root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).step("leave old root")?;
    rustix::process::chdir("/").step("chdir /")
}

/// Say of each mount whether every sandbox needs its own: because the kernel makes it so (a procfs
/// of its pid namespace, a scratch of its own, its own user id), or because it lies in such a one.
fn privates(plan: &Plan) -> Vec<bool> {
    let mut private: Vec<bool> = Vec::new();
    for mount in &plan.mounts {
        let own = match mount {
            Mount::Proc { .. } | Mount::Tmpfs { .. } | Mount::Overlay { .. } => true,
            Mount::Bind { mapped, .. } => *mapped && plan.identity.owner.is_some(),
            _ => false,
        };
        let covered = plan.mounts[..private.len()]
            .iter()
            .zip(&private)
            .any(|(outer, private)| *private && inside(mount.target(), outer.target()));
        private.push(own || covered);
    }
    private
}

fn targets(plan: &Plan, private: &[bool]) -> Vec<OsString> {
    let chosen = plan.mounts.iter().zip(private).filter(|(_, private)| **private);
    chosen.map(|(mount, _)| mount.target().to_os_string()).collect()
}

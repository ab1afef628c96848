//! Step "root": a workspace whose changes go to a private layer, overlayfs in the kernel's
//! filesystems documentation. The layer's descriptor goes to the supervisor, which shows, commits or
//! drops it after the call.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;

use crate::report::{Failure, Step};
use crate::request::Mount;
use crate::site::{self, Site};

/// Make the places on the stage that the layer and the mapped source will have.
pub fn reserve(site: &Site, number: usize) -> Result<(), Failure> {
    for name in [layer(number), below(number)] {
        let path = site::relative(name.as_ref());
        rustix::fs::mkdirat(&site.fd, path, Mode::from_raw_mode(0o755)).step_on("mkdir", &name)?;
    }
    Ok(())
}

/// Attach the overlay at its target and return its layer: the folder that takes all changes.
pub fn attach(
    site: &Site,
    number: usize,
    mount: &Mount,
    mapping: Option<BorrowedFd>,
    as_root: bool,
) -> Result<OwnedFd, Failure> {
    let Mount::Overlay { target, bytes, inodes, mapped, .. } = mount else {
        return Err(Failure::protocol("not an overlay"));
    };
    let mapping = mapping.filter(|_| *mapped);
    let mut lower = site::staged(number);
    if mapping.is_some() {
        let tree = site.staged(number, mapping)?;
        lower = below(number);
        site.put(&tree, lower.as_ref(), true)?;
    }
    let scratch = site::scratch(*bytes, *inodes, 0o700)?;
    let place = layer(number);
    site.put(&scratch, place.as_ref(), true)?;
    let (upper, work) = (format!("{place}/upper"), format!("{place}/work"));
    make_upper(site, &lower, &upper, &work)?;
    let mut options = vec![
        ("lowerdir", lower),
        ("upperdir", upper.clone()),
        ("workdir", work),
        // Nothing in the layer may point elsewhere: it is read by the supervisor.
        ("redirect_dir", "nofollow".to_owned()),
        ("metacopy", "off".to_owned()),
        ("index", "off".to_owned()),
    ];
    if !as_root {
        options.push(("userxattr", String::new()));
    }
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let merged = site::fresh("overlay", &options, attributes)?;
    site.put(&merged, target, true)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(&site.fd, site::relative(upper.as_ref()), flags, Mode::empty())
        .step_on("open", &upper)
}

/// Make the upper folder look like the one it lies over, which it stands for in the overlay.
fn make_upper(site: &Site, lower: &str, upper: &str, work: &str) -> Result<(), Failure> {
    let found = site::open_path(site.fd.as_fd(), site::relative(lower.as_ref()), site::beneath())
        .step_on("open", lower)?;
    let stat = rustix::fs::fstat(&found).step_on("stat", lower)?;
    for name in [upper, work] {
        let path: &OsStr = site::relative(name.as_ref());
        rustix::fs::mkdirat(&site.fd, path, Mode::from_raw_mode(0o700)).step_on("mkdir", name)?;
    }
    let path: &OsStr = site::relative(upper.as_ref());
    let (uid, gid) =
        (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(&site.fd, path, Some(uid), Some(gid), flags).step_on("chown", upper)?;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o777);
    rustix::fs::chmodat(&site.fd, path, mode, rustix::fs::AtFlags::empty()).step_on("chmod", upper)
}

fn layer(number: usize) -> String {
    format!("{}.layer", site::staged(number))
}

fn below(number: usize) -> String {
    format!("{}.below", site::staged(number))
}

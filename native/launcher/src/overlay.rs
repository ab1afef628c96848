//! Step "root": a workspace whose changes go to a private layer, overlayfs in the kernel's
//! filesystems documentation. The layer's descriptor goes to the supervisor, which shows, commits or
//! drops it after the call.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::mount::{FsPickFlags, MountAttrFlags};
use rustix::thread::{self, CapabilitySets};

use crate::report::{self, Failure, Message, Step};
use crate::request::Mount;
use crate::site::{self, Site};
use crate::{receive, sys};

/// LIMIT: inodes beyond the bound of a layer while an overlay is mounted over it. The kernel tries
/// there what it needs, `ovl_make_workdir` in its fs/overlayfs/super.c; a layer that an earlier call
/// filled to the last inode could never be mounted again, not even to remove something.
const SPARE_INODES: u64 = 64;

/// What one sandbox has for itself.
pub struct Own<'a> {
    pub mapping: Option<BorrowedFd<'a>>,
    /// Whom the mapping shows as the sandbox's own user.
    pub owner: Option<(u32, u32)>,
    pub channel: BorrowedFd<'a>,
}

/// Make the places on the stage that the layer and the mapped source will have.
pub fn reserve(site: &Site, number: usize) -> Result<(), Failure> {
    for name in [layer(number), below(number)] {
        let path = site::relative(name.as_ref());
        rustix::fs::mkdirat(&site.fd, path, Mode::from_raw_mode(0o755)).step_on("mkdir", &name)?;
    }
    Ok(())
}

/// Attach the overlay at its target and hand the supervisor its layer: the folder that takes all
/// changes. Of a session it gets the layer's next mount, and the merged folder, whose file system
/// ends with the sandbox.
pub fn attach(
    site: &Site,
    number: usize,
    mount: &Mount,
    own: &Own,
    as_root: bool,
) -> Result<(), Failure> {
    let Mount::Overlay { target, bytes, inodes, mapped, session, .. } = mount else {
        return Err(Failure::protocol("not an overlay"));
    };
    let own = Own { mapping: own.mapping.filter(|_| *mapped), ..*own };
    let staged = site::staged(number);
    let mut lower = staged.clone();
    if own.mapping.is_some() {
        let tree = site.staged(number, own.mapping)?;
        lower = below(number);
        site.put(&tree, lower.as_ref(), true)?;
    }
    let place = layer(number);
    let mut user = None;
    if *session {
        user = take_over(site, &staged, &place, (*bytes, *inodes), &own)?;
    } else {
        let scratch = site::scratch(*bytes, *inodes, 0o700)?;
        site.put(&scratch, place.as_ref(), true)?;
        make_upper(site, &lower, &place)?;
    }
    let upper = format!("{place}/upper");
    let mut options = vec![
        ("lowerdir", lower),
        ("upperdir", upper.clone()),
        ("workdir", format!("{place}/work")),
        // Nothing in the layer may point elsewhere: it is read by the supervisor.
        ("redirect_dir", "nofollow".to_owned()),
        ("metacopy", "off".to_owned()),
        ("index", "off".to_owned()),
    ];
    if *session {
        // With these four off, what is below may change from one mount to the next, overlayfs.rst
        // "Changes to underlying filesystems".
        options.push(("xino", "off".to_owned()));
    }
    if !as_root {
        options.push(("userxattr", String::new()));
    }
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let make = || site::fresh("overlay", &options, attributes);
    let merged = user.map_or_else(make, |user| as_user(user, make))?;
    site.put(&merged, target, true)?;
    if *session {
        resize(&site::clone_tree(place.as_ref(), false)?, (*bytes, *inodes))?;
        report::send_with(own.channel, &Message::Layer, &[merged.as_fd()]);
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let path = site::relative(upper.as_ref());
    let opened =
        rustix::fs::openat(&site.fd, path, flags, Mode::empty()).step_on("open", &upper)?;
    report::send_with(own.channel, &Message::Layer, &[opened.as_fd()]);
    Ok(())
}

/// Attach the layer that the supervisor holds, or make the first; tell as whom to mount.
///
/// It holds a mount of its own in no namespace, which can be attached but once. So it gets another
/// before anything else can fail.
fn take_over(
    site: &Site,
    staged: &str,
    place: &str,
    bounds: (u64, u64),
    own: &Own,
) -> Result<Option<(Uid, Gid)>, Failure> {
    let line = rustix::io::fcntl_dupfd_cloexec(own.channel, 0).step("channel")?;
    let (word, mut trees) = receive::datagram(&line)?.ok_or(Failure::protocol("no layer"))?;
    let found = match (word.as_slice(), trees.pop(), trees.len()) {
        (b"first", None, 0) => None,
        (b"again", Some(tree), 0) => Some(tree),
        _ => return Err(Failure::protocol("not a layer")),
    };
    let tree = match &found {
        None => &site::scratch(bounds.0, bounds.1, 0o700)?,
        Some(tree) => {
            resize(tree, (bounds.0, bounds.1.saturating_add(SPARE_INODES)))?;
            tree
        }
    };
    site.put(tree, place.as_ref(), true)?;
    if found.is_none() {
        make_upper(site, staged, place)?;
        for name in [place, &format!("{place}/work")] {
            let owner = own.owner.filter(|_| own.mapping.is_some());
            owner.map_or(Ok(()), |owner| change_owner(site, name, owner))?;
        }
    }
    let next = site::clone_tree(place.as_ref(), false)?;
    report::send_with(own.channel, &Message::Layer, &[next.as_fd()]);
    reopen(site, place)?;
    let Some(mapping) = own.mapping else {
        return Ok(None);
    };
    // Each sandbox has another user. In the layer all is the owner's, as it is below.
    let shown = site::clone_tree(place.as_ref(), false)?;
    sys::mount_setattr(shown.as_fd(), false, 0, Some(mapping)).step_on("map ids", place)?;
    site.put(&shown, place.as_ref(), true)?;
    let found = rustix::fs::fstat(&shown).step_on("stat", place)?;
    Ok(Some((Uid::from_raw(found.st_uid), Gid::from_raw(found.st_gid))))
}

/// Let the owner into the workspace again: an earlier call may have taken that right away.
fn reopen(site: &Site, place: &str) -> Result<(), Failure> {
    let upper = format!("{place}/upper");
    let path: &OsStr = site::relative(upper.as_ref());
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    let found = rustix::fs::statat(&site.fd, path, flags).step_on("stat", &upper)?;
    let mode = Mode::from_raw_mode((found.st_mode & 0o7777) | 0o700);
    let flags = rustix::fs::AtFlags::empty();
    rustix::fs::chmodat(&site.fd, path, mode, flags).step_on("chmod", &upper)
}

/// Bound a layer anew, by the limits of this call; the kernel refuses less than it holds.
fn resize(tree: &OwnedFd, (bytes, inodes): (u64, u64)) -> Result<(), Failure> {
    let flags = FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC;
    let context = rustix::mount::fspick(tree.as_fd(), "", flags).step("pick layer")?;
    for (key, value) in [("size", bytes), ("nr_inodes", inodes)] {
        rustix::mount::fsconfig_set_string(context.as_fd(), key, value.max(1).to_string().as_str())
            .step_on("configure", key)?;
    }
    rustix::mount::fsconfig_reconfigure(context.as_fd()).step("resize layer")
}

/// Do one thing as another user, with all that root may do. An overlay does its own work as
/// whoever mounted it, and where ids are mapped, nobody without one can make a file,
/// `fsuidgid_has_mapping` in the kernel's documentation of id mappings.
fn as_user<T>(
    (uid, gid): (Uid, Gid),
    act: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let had = thread::capabilities(None).step("capget")?;
    thread::set_thread_res_gid(None, gid, None).step("setresgid")?;
    thread::set_thread_res_uid(None, uid, None).step("setresuid")?;
    // They become ineffective with the user id, capabilities(7).
    let all = CapabilitySets { effective: had.permitted, ..had };
    let done = thread::set_capabilities(None, all).step("capset").and_then(|()| act());
    thread::set_thread_res_uid(None, Uid::ROOT, None).step("setresuid")?;
    thread::set_thread_res_gid(None, Gid::ROOT, None).step("setresgid")?;
    thread::set_capabilities(None, had).step("capset")?;
    done
}

/// Make the upper folder look like the one it lies over, which it stands for in the overlay.
fn make_upper(site: &Site, lower: &str, place: &str) -> Result<(), Failure> {
    let found = site::open_path(site.fd.as_fd(), site::relative(lower.as_ref()), site::beneath())
        .step_on("open", lower)?;
    let stat = rustix::fs::fstat(&found).step_on("stat", lower)?;
    let upper = format!("{place}/upper");
    for name in [&upper, &format!("{place}/work")] {
        let path: &OsStr = site::relative(name.as_ref());
        rustix::fs::mkdirat(&site.fd, path, Mode::from_raw_mode(0o700)).step_on("mkdir", name)?;
    }
    change_owner(site, &upper, (stat.st_uid, stat.st_gid))?;
    let path: &OsStr = site::relative(upper.as_ref());
    let mode = Mode::from_raw_mode(stat.st_mode & 0o777);
    let flags = rustix::fs::AtFlags::empty();
    rustix::fs::chmodat(&site.fd, path, mode, flags).step_on("chmod", &upper)
}

fn change_owner(site: &Site, name: &str, (uid, gid): (u32, u32)) -> Result<(), Failure> {
    let path: &OsStr = site::relative(name.as_ref());
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(&site.fd, path, Some(uid), Some(gid), flags).step_on("chown", name)
}

fn layer(number: usize) -> String {
    format!("{}.layer", site::staged(number))
}

fn below(number: usize) -> String {
    format!("{}.below", site::staged(number))
}

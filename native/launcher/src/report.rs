//! Step "report": what the supervisor is told, one JSON datagram at a time.

use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;

use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Serialize;

/// LIMIT: characters of a subject in a report; a message must fit into one datagram.
const SUBJECT_MAX: usize = 4096;
/// LIMIT: descriptors sent along with one message.
const DESCRIPTORS_MAX: usize = 253;

/// The step that failed and the kernel's reason. No sandbox survives a failure.
#[derive(Debug, Serialize)]
pub struct Failure {
    pub step: String,
    pub errno: i32,
    /// A sandbox made anew may do better.
    pub stale: bool,
}

impl Failure {
    pub fn new(step: impl Into<String>, errno: Errno) -> Self {
        Self { step: step.into(), errno: errno.raw_os_error(), stale: false }
    }

    pub fn on(name: &str, subject: impl AsRef<OsStr>, errno: Errno) -> Self {
        let subject = subject.as_ref().to_string_lossy();
        let subject: String = subject.chars().take(SUBJECT_MAX).collect();
        Self::new(format!("{name} {subject}"), errno)
    }

    /// Say that it may come from a workspace that changed after the sandbox was planned.
    pub fn or_stale(mut self) -> Self {
        let changed = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP, Errno::STALE];
        self.stale = changed.map(Errno::raw_os_error).contains(&self.errno);
        self
    }

    pub fn protocol(what: &str) -> Self {
        Self::new(format!("request: {what}"), Errno::PROTO)
    }
}

/// Name the step an errno came from.
pub trait Step<T> {
    fn step(self, name: &str) -> Result<T, Failure>;
    fn step_on(self, name: &str, subject: impl AsRef<OsStr>) -> Result<T, Failure>;
}

impl<T> Step<T> for Result<T, Errno> {
    fn step(self, name: &str) -> Result<T, Failure> {
        self.map_err(|errno| Failure::new(name, errno))
    }

    fn step_on(self, name: &str, subject: impl AsRef<OsStr>) -> Result<T, Failure> {
        self.map_err(|errno| Failure::on(name, subject, errno))
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Message<'a> {
    /// Sent once by a launcher that is ready.
    Hello { version: u32, landlock_abi: i32 },
    /// Sent once by a template that is ready.
    Template,
    /// A new sandbox, with its channel, the read ends of its stdout and stderr, and a pidfd of its
    /// init: whoever kills that ends the sandbox also where its init does not listen any more.
    Sandbox {
        number: u64,
        uid: u32,
        /// Another one follows when it is gone.
        again: bool,
        scratch: Option<&'a str>,
    },
    /// Clones of mounts, in the order asked.
    Clones,
    /// The private writable layer of an overlay.
    Layer,
    /// The listener that tells of refused system calls, `seccomp_unotify(2)`.
    Listener,
    /// Nothing of the call ran, or all of it is gone.
    Failed(&'a Failure),
    /// The whole process tree is gone.
    Exited(Exit),
}

/// How the program ended and what its tree used, getrusage(2) `RUSAGE_CHILDREN`.
#[derive(Debug, Default, Serialize)]
pub struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// The wall limit passed, counted by the sandbox's own init.
    pub wall_limit: bool,
    pub wall_us: u64,
    pub cpu_us: u64,
    pub peak_rss_kib: u64,
    /// To and from block devices, not caches.
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// What of a private tmpfs was used up in the end: "disk" or "inodes".
    pub full: Option<&'static str>,
    /// Content of each account of the plan's cgroups, in order; empty where unreadable.
    pub accounts: Vec<String>,
}

/// Send one message. A supervisor that is gone is not an error: its silence already means "stop".
pub fn send(channel: impl AsFd, message: &Message) {
    send_with(channel, message, &[]);
}

/// Send one message and copies of descriptors along with it.
pub fn send_with(channel: impl AsFd, message: &Message, descriptors: &[BorrowedFd]) {
    let Ok(bytes) = serde_json::to_vec(message) else {
        return;
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return;
    }
    let data = [IoSlice::new(&bytes)];
    let flags = SendFlags::NOSIGNAL;
    let _ =
        rustix::io::retry_on_intr(|| rustix::net::sendmsg(&channel, &data, &mut ancillary, flags));
}

//! Step "report": what the supervisor is told, one JSON datagram at a time.

use std::ffi::OsStr;

use rustix::fd::AsFd;
use rustix::io::Errno;
use serde::Serialize;

/// LIMIT: characters of a subject in a report; a message must fit into one datagram.
const SUBJECT_MAX: usize = 4096;

/// The step that failed and the kernel's reason. No sandbox survives a failure.
#[derive(Debug, Serialize)]
pub struct Failure {
    pub step: String,
    pub errno: i32,
}

impl Failure {
    pub fn new(step: impl Into<String>, errno: Errno) -> Self {
        Self {
            step: step.into(),
            errno: errno.raw_os_error(),
        }
    }

    pub fn on(name: &str, subject: impl AsRef<OsStr>, errno: Errno) -> Self {
        let subject = subject.as_ref().to_string_lossy();
        let subject: String = subject.chars().take(SUBJECT_MAX).collect();
        Self::new(format!("{name} {subject}"), errno)
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
    /// The program replaced the stub: execve(2) succeeded.
    Started,
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
}

/// Send one message. A supervisor that is gone is not an error: its silence already means "stop".
pub fn send(channel: impl AsFd, message: &Message) {
    let Ok(bytes) = serde_json::to_vec(message) else {
        return;
    };
    let _ = rustix::net::send(channel, &bytes, rustix::net::SendFlags::NOSIGNAL);
}

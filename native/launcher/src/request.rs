//! Step "request": what the supervisor may ask for, parsed and bounded before anything is made.
//!
//! The supervisor is the only peer. Every document is JSON; unknown keys are refused so that a
//! newer supervisor is never half obeyed. `runtime/sandbox/channel.py` writes them.

use std::ffi::{OsStr, OsString};
use std::ops::Deref;
use std::os::unix::ffi::OsStringExt;

use rustix::fd::{AsFd, OwnedFd};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};

use crate::report::{Failure, Step};

/// LIMIT: bytes of one document; Linux bounds argv and environment to 2 MiB together, execve(2).
const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// LIMIT: bytes of one seccomp program: 4,096 instructions of 8 bytes, seccomp(2) BPF_MAXINSNS.
const FILTER_BYTES_MAX: u64 = 4096 * 8;
/// LIMIT: entries of any one list.
const LIST_MAX: usize = 4096;
/// LIMIT: the longest wall limit, a year, so that a deadline can be computed.
pub const WALL_MS_MAX: u64 = 365 * 24 * 3600 * 1000;

pub const VERSION: u32 = 2;

/// A file name or argument: bytes, whatever their encoding. The document carries each byte as the
/// character of that number, since no JSON string can hold a name that is not UTF-8.
#[derive(Debug)]
pub struct Text(OsString);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(document: D) -> Result<Self, D::Error> {
        let text = String::deserialize(document)?;
        let byte = |letter| u8::try_from(u32::from(letter)).ok().filter(|byte| *byte != 0);
        let bytes: Option<Vec<u8>> = text.chars().map(byte).collect();
        let bytes = bytes.ok_or(D::Error::custom("NUL or a character above 255"))?;
        Ok(Self(OsString::from_vec(bytes)))
    }
}

impl AsRef<OsStr> for Text {
    fn as_ref(&self) -> &OsStr {
        &self.0
    }
}

impl Deref for Text {
    type Target = OsStr;

    fn deref(&self) -> &OsStr {
        &self.0
    }
}

/// What the sandboxes of one template have in common.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub version: u32,
    pub layers: Vec<Layer>,
    pub identity: Identity,
    pub network: Network,
    pub mounts: Vec<Mount>,
    pub landlock: Vec<Rule>,
    pub rlimits: Vec<Rlimit>,
    /// One cgroup in each of these is made for every sandbox.
    pub cgroups: Vec<Group>,
    /// What the names of its sandboxes' cgroups and scratch folders begin with.
    pub name: String,
    /// Folder on the host in which every sandbox gets an empty one of its own.
    pub scratch: Option<Text>,
    /// Mounts and rules of a call come later, in a `Bind`.
    pub late: bool,
    /// Answer refused system calls through a listener that is handed to the supervisor.
    pub explain: bool,
}

impl Plan {
    pub fn has(&self, layer: Layer) -> bool {
        self.layers.contains(&layer)
    }
}

/// One thing that confines. What is not listed is not applied, and the trace says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// user, mount, pid, net, ipc, uts and cgroup namespaces together.
    Namespaces,
    Landlock,
    Seccomp,
    Capabilities,
}

/// Which network namespace a sandbox gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// The template's empty one; safe to share where seccomp refuses socket(2).
    Shared,
    /// A new one for every sandbox.
    Own,
}

/// The host ids the program runs as, and the id it believes it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Sandboxes of a template made by root have `uid`, `uid` + 1, … and the gids alike.
    pub uid: u32,
    pub gid: u32,
    pub inside: u32,
    /// On-disk owner (uid, gid) that id-mapped mounts show as the sandbox's own ids.
    pub owner: Option<(u32, u32)>,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Mount {
    Bind {
        source: Text,
        target: Text,
        #[serde(default)]
        write: bool,
        #[serde(default)]
        device: bool,
        #[serde(default)]
        mapped: bool,
        /// Must still be in place when the program starts.
        #[serde(default)]
        held: bool,
    },
    /// `source` below a private writable layer of `bytes` and `inodes`; nothing reaches `source`.
    Overlay {
        source: Text,
        target: Text,
        bytes: u64,
        inodes: u64,
        #[serde(default)]
        mapped: bool,
        /// The layer outlives this sandbox: the supervisor hands it from one to the next.
        #[serde(default)]
        session: bool,
    },
    /// Private to each sandbox.
    Tmpfs {
        target: Text,
        bytes: u64,
        inodes: u64,
        mode: u32,
    },
    /// Private to each sandbox.
    Proc {
        target: Text,
    },
    /// Hide what is at `target`, if anything is; `empty` makes a file that can be opened.
    Mask {
        target: Text,
        #[serde(default)]
        empty: bool,
        #[serde(default)]
        held: bool,
    },
    Folder {
        target: Text,
    },
    Link {
        target: Text,
        to: Text,
    },
    File {
        target: Text,
        text: String,
    },
}

impl Mount {
    pub fn target(&self) -> &Text {
        match self {
            Self::Bind { target, .. }
            | Self::Overlay { target, .. }
            | Self::Tmpfs { target, .. }
            | Self::Proc { target }
            | Self::Mask { target, .. }
            | Self::Folder { target }
            | Self::Link { target, .. }
            | Self::File { target, .. } => target,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    pub path: Text,
    pub access: Access,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// Read and execute files, list folders, everywhere beneath.
    Read,
    /// Read and execute files by their names; folders cannot be listed.
    Use,
    /// All of `Read`, and change everything beneath.
    Write,
    /// List folders, read nothing.
    List,
    /// Read and write one device node.
    Device,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    pub name: RlimitName,
    pub value: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RlimitName {
    Core,
    Cpu,
    Data,
    Fsize,
    Memlock,
    Msgqueue,
    Nice,
    Nofile,
    Nproc,
    Rtprio,
    Sigpending,
}

/// A folder of a cgroup hierarchy that may hold cgroups of ours.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    pub base: Text,
    /// Files to write into each new cgroup, in order; whether the kernel must have them.
    pub settings: Vec<(String, String, bool)>,
    /// Files to read when its sandbox is over; what they held is in the `Exit`.
    pub accounts: Vec<String>,
}

/// Mounts to clone for a sandbox whose plan was `late`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clones {
    pub identity: Identity,
    pub mounts: Vec<Mount>,
}

/// The mounts and rules of one call, for a sandbox whose plan was `late`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    /// Where the detached mounts that came along are attached, in order; masks take none.
    pub mounts: Vec<Mount>,
    pub landlock: Vec<Rule>,
}

/// The program a sandbox becomes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    pub argv: Vec<Text>,
    pub environment: Vec<Text>,
    pub cwd: Text,
    /// `PATH` of the sandbox, searched when `argv[0]` holds no slash.
    pub search: Vec<Text>,
    pub wall_ms: u64,
    /// Bounds lower than the plan's.
    pub rlimits: Vec<Rlimit>,
    /// What the descriptors that came along become; -1 only lives until execve(2) succeeds.
    pub descriptors: Vec<i32>,
}

/// Read the plan of a template. INVARIANT: nothing has been made yet when this refuses.
pub fn plan(document: &OwnedFd) -> Result<Plan, Failure> {
    let plan: Plan = parse(&read_all(document, DOCUMENT_BYTES_MAX)?)?;
    if plan.version != VERSION {
        return Err(Failure::protocol("unknown request version"));
    }
    if plan.identity.inside == 0 {
        return Err(Failure::protocol("root inside"));
    }
    if !plan.has(Layer::Namespaces) && !plan.has(Layer::Landlock) {
        // INVARIANT: a tree is ended by signalling all that init can reach; without a border
        // around it that would be every process of the user.
        return Err(Failure::protocol("neither namespaces nor landlock"));
    }
    let lists = [plan.mounts.len(), plan.landlock.len(), plan.rlimits.len(), plan.cgroups.len()];
    if lists.iter().any(|length| *length > LIST_MAX) {
        return Err(Failure::protocol("a list is too long"));
    }
    Ok(plan)
}

/// Read which mounts to clone.
pub fn clones(document: &OwnedFd) -> Result<Clones, Failure> {
    parse(&read_all(document, DOCUMENT_BYTES_MAX)?)
}

/// Read a seccomp program: native byte order `struct sock_filter[]`, compiled by libseccomp.
pub fn filter(memfd: &OwnedFd) -> Result<Vec<u8>, Failure> {
    read_all(memfd, FILTER_BYTES_MAX)
}

/// Read what becomes of a waiting sandbox: inline, or from the first descriptor that came along.
pub fn document<T: DeserializeOwned>(
    inline: &[u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<T, Failure> {
    if inline != [0] {
        return parse(inline);
    }
    if descriptors.is_empty() {
        return Err(Failure::protocol("no document"));
    }
    let memfd = descriptors.remove(0);
    parse(&read_all(&memfd, DOCUMENT_BYTES_MAX)?)
}

pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(bytes).map_err(|error| Failure::protocol(&error.to_string()))
}

fn read_all(memfd: &OwnedFd, limit: u64) -> Result<Vec<u8>, Failure> {
    let size = rustix::fs::fstat(memfd).step("fstat request")?.st_size;
    let size = u64::try_from(size).unwrap_or(u64::MAX);
    if size > limit {
        return Err(Failure::protocol("request is too large"));
    }
    let mut bytes = vec![0_u8; usize::try_from(size).unwrap_or(0)];
    let mut done = 0;
    while done < bytes.len() {
        let count = rustix::io::pread(memfd.as_fd(), &mut bytes[done..], done as u64)
            .step("read request")?;
        if count == 0 {
            return Err(Failure::protocol("request shrank while it was read"));
        }
        done += count;
    }
    Ok(bytes)
}

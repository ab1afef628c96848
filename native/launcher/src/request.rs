//! Step "request": what the supervisor may ask for, parsed and bounded before anything is made.
//!
//! The supervisor is the only peer. Its request is one JSON document in a memfd; unknown keys are
//! refused so that a newer supervisor is never half obeyed. `runtime/sandbox/native.py` writes it.

use std::ffi::{OsStr, OsString};
use std::ops::Deref;
use std::os::unix::ffi::OsStringExt;

use rustix::fd::{AsFd, OwnedFd};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::report::{Failure, Step};

/// LIMIT: bytes of one request; Linux bounds argv and environment to 2 MiB together, execve(2).
const REQUEST_BYTES_MAX: u64 = 4 << 20;
/// LIMIT: bytes of one seccomp program: 4,096 instructions of 8 bytes, seccomp(2) BPF_MAXINSNS.
const FILTER_BYTES_MAX: u64 = 4096 * 8;
/// LIMIT: entries of any one list.
const LIST_MAX: usize = 4096;

pub const VERSION: u32 = 1;

/// A file name or argument: bytes, whatever their encoding. The document carries each byte as the
/// character of that number, since no JSON string can hold a name that is not UTF-8.
#[derive(Debug)]
pub struct Text(OsString);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(document: D) -> Result<Self, D::Error> {
        let text = String::deserialize(document)?;
        let byte = |letter| {
            u8::try_from(u32::from(letter))
                .ok()
                .filter(|byte| *byte != 0)
        };
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

/// One sandbox to make and the program to start in it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub version: u32,
    pub layers: Vec<Layer>,
    pub argv: Vec<Text>,
    pub environment: Vec<Text>,
    pub cwd: Text,
    /// `PATH` of the sandbox, searched when `argv[0]` holds no slash.
    pub search: Vec<Text>,
    pub identity: Identity,
    pub mounts: Vec<Mount>,
    pub landlock: Vec<Rule>,
    pub rlimits: Vec<Rlimit>,
    /// `cgroup.procs` files to join, made by the supervisor for this call alone.
    pub cgroups: Vec<Text>,
    pub wall_ms: u64,
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

/// The host ids the program runs as, and the id it believes it has.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub inside: u32,
    /// On-disk owner (uid, gid) that id-mapped mounts show as `uid`, `gid`.
    pub owner: Option<(u32, u32)>,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Mount {
    /// `optional` skips a target that does not exist (a masked file this kernel lacks).
    Bind {
        source: Text,
        target: Text,
        #[serde(default)]
        write: bool,
        #[serde(default)]
        device: bool,
        #[serde(default)]
        mapped: bool,
        #[serde(default)]
        optional: bool,
    },
    Tmpfs {
        target: Text,
        bytes: u64,
        inodes: u64,
        mode: u32,
        write: bool,
        #[serde(default)]
        optional: bool,
    },
    Proc {
        target: Text,
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

#[derive(Debug, Clone, Copy, Deserialize)]
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

/// A request and the descriptors that came with it, in the order of the protocol.
#[derive(Debug)]
pub struct Job {
    pub request: Request,
    /// Where the fate of the call is told; its far end closing means "stop now".
    pub channel: OwnedFd,
    pub stdio: [OwnedFd; 3],
    /// Compiled by libseccomp in the supervisor; native byte order `struct sock_filter[]`.
    pub filter: Vec<u8>,
    /// Descriptors the program itself gets, from 3 upward.
    pub extra: Vec<OwnedFd>,
}

/// Parse what arrived. INVARIANT: nothing has been made yet when this refuses.
pub fn parse(descriptors: Vec<OwnedFd>) -> Result<Job, (Option<OwnedFd>, Failure)> {
    let mut descriptors = descriptors.into_iter();
    let Some(channel) = descriptors.next() else {
        return Err((None, Failure::protocol("no channel")));
    };
    match assemble(descriptors) {
        Ok((request, filter, stdio, extra)) => Ok(Job {
            request,
            channel,
            stdio,
            filter,
            extra,
        }),
        Err(failure) => Err((Some(channel), failure)),
    }
}

type Parts = (Request, Vec<u8>, [OwnedFd; 3], Vec<OwnedFd>);

fn assemble(mut descriptors: impl Iterator<Item = OwnedFd>) -> Result<Parts, Failure> {
    let mut next = |what| descriptors.next().ok_or(Failure::protocol(what));
    let document = next("no request document")?;
    let program = next("no seccomp program")?;
    let stdio = [next("no stdin")?, next("no stdout")?, next("no stderr")?];
    let request: Request = serde_json::from_slice(&read_all(&document, REQUEST_BYTES_MAX)?)
        .map_err(|error| Failure::protocol(&error.to_string()))?;
    check(&request)?;
    let filter = read_all(&program, FILTER_BYTES_MAX)?;
    Ok((request, filter, stdio, descriptors.collect()))
}

fn check(request: &Request) -> Result<(), Failure> {
    if request.version != VERSION {
        return Err(Failure::protocol("unknown request version"));
    }
    if request.argv.is_empty() || request.identity.inside == 0 {
        return Err(Failure::protocol("empty argv or root inside"));
    }
    let held = [Layer::Namespaces, Layer::Landlock];
    if !held.iter().any(|layer| request.layers.contains(layer)) {
        // INVARIANT: a tree is ended by signalling all that init can reach; without a border
        // around it that would be every process of the user.
        return Err(Failure::protocol("neither namespaces nor landlock"));
    }
    let lists = [
        request.mounts.len(),
        request.landlock.len(),
        request.rlimits.len(),
        request.cgroups.len(),
        request.search.len(),
    ];
    if lists.iter().any(|length| *length > LIST_MAX) {
        return Err(Failure::protocol("a list is too long"));
    }
    Ok(())
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

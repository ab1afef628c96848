//! Hostile documents and descriptors against the parsers of `request.rs` and `receive.rs`.
//!
//! Mutations are pseudo-random from a fixed seed: a failure comes back with its number.

use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::pipe::PipeFlags;

use crate::report::Failure;
use crate::request::{self, Bind, Layer, Run};
use crate::{receive, sys};

const ROUNDS: u64 = 20_000;
const PLAN: &str = r#"{"version":2,"layers":["landlock","seccomp","capabilities","namespaces"],
"identity":{"uid":1001,"gid":1001,"inside":1000,"owner":[0,0]},"network":"shared","mounts":[
{"kind":"tmpfs","target":"/tmp","bytes":268435456,"inodes":1000,"mode":1023},
{"kind":"bind","source":"/dev/null","target":"/dev/null","device":true,"write":true},
{"kind":"proc","target":"/proc"},{"kind":"mask","target":"/proc/sys","held":true},
{"kind":"mask","target":"/proc/cpuinfo","empty":true},{"kind":"folder","target":"/work"},
{"kind":"link","target":"/bin","to":"usr/bin"},{"kind":"file","target":"/etc/hosts","text":"x\n"},
{"kind":"bind","source":"/usr","target":"/usr","mapped":true,"held":true},
{"kind":"overlay","source":"/w","target":"/w","bytes":1,"inodes":1,"mapped":true,"session":true}],
"landlock":[{"path":"/usr","access":"read"},{"path":"/tmp","access":"write"}],
"rlimits":[{"name":"nofile","value":1024},{"name":"core","value":0}],
"cgroups":[{"base":"/cg","settings":[["memory.max","1",true]],"accounts":["memory.peak"]}],
"name":"abc","scratch":null,"late":false,"explain":false}"#;
const RUN: &str = r#"{"argv":["sh","-c","\u00e9 \u00ff"],"environment":["A=b","PATH=/bin"],
"cwd":"/tmp","search":["/bin","/usr/bin"],"wall_ms":30000,
"rlimits":[{"name":"cpu","value":3}],"descriptors":[0,1,2,-1,64]}"#;
const BIND: &str = r#"{"mounts":[{"kind":"bind","source":"/w","target":"/w","write":true},
{"kind":"mask","target":"/w/.env","held":true}],"landlock":[{"path":"/w","access":"write"}]}"#;
const CLONES: &str = r#"{"identity":{"uid":1,"gid":1,"inside":1,"owner":null},
"mounts":[{"kind":"bind","source":"/w","target":"/w","mapped":true}]}"#;
/// What tends to break parsers, put in place of something or beside it.
const PIECES: [&str; 24] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    ",",
    ":",
    "null",
    "-1",
    "1e999",
    "18446744073709551616",
    "0.5",
    "\\u0000",
    "\\ud800",
    "\\u0100",
    "/../",
    "\"version\":2,",
    "\"kind\":\"bind\",",
    "true",
    "\\",
    "[[[[[[[[",
    "{\"a\":",
    "\u{feff}",
    "\0",
];

/// xorshift64*, Vigna 2016: enough to choose mutations.
struct Choice(u64);

impl Choice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
        usize::try_from(number).unwrap() % bound.max(1)
    }

    fn mutate(&mut self, valid: &str) -> Vec<u8> {
        let mut bytes = valid.as_bytes().to_vec();
        for _ in 0..=self.below(4) {
            let (at, to) = (self.below(bytes.len()), self.below(bytes.len()));
            match self.below(6) {
                0 => bytes.truncate(at),
                1 if at < bytes.len() => bytes[at] = u8::try_from(self.below(256)).unwrap(),
                2 => drop(bytes.drain(at.min(to)..at.max(to))),
                3 => {
                    let copy = bytes[at.min(to)..at.max(to)].to_vec();
                    bytes.splice(at..at, copy);
                }
                _ => {
                    let piece = PIECES[self.below(PIECES.len())];
                    bytes.splice(at..at, piece.bytes());
                }
            }
        }
        bytes
    }
}

fn memory(bytes: &[u8]) -> OwnedFd {
    let memfd = rustix::fs::memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(rustix::io::write(&memfd, bytes).unwrap(), bytes.len());
    memfd
}

#[test]
fn the_valid_documents_are_accepted() {
    assert_eq!(request::plan(&memory(PLAN.as_bytes())).unwrap().mounts.len(), 10);
    let run: Run = request::parse(RUN.as_bytes()).unwrap();
    // Each character of a document is one byte of the text.
    assert_eq!(run.argv[2].as_encoded_bytes(), b"\xe9 \xff");
    assert_eq!(request::parse::<Bind>(BIND.as_bytes()).unwrap().mounts.len(), 2);
    assert_eq!(request::clones(&memory(CLONES.as_bytes())).unwrap().mounts.len(), 1);
}

#[test]
fn mutated_documents_are_refused_or_keep_the_invariants() {
    let mut choice = Choice(0x5AFE_C04D);
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..ROUNDS {
        let bytes = choice.mutate([PLAN, RUN, BIND, CLONES][usize::try_from(round % 4).unwrap()]);
        let kept = match round % 4 {
            0 => request::plan(&memory(&bytes)).map(|plan| {
                assert_eq!(plan.version, request::VERSION, "round {round}");
                assert_ne!(plan.identity.inside, 0, "round {round}");
                let walls = plan.has(Layer::Namespaces) || plan.has(Layer::Landlock);
                assert!(walls, "round {round}");
                no_nul(plan.mounts.iter().map(|mount| -> &OsStr { mount.target() }));
            }),
            1 => request::parse::<Run>(&bytes).map(|run| {
                no_nul(run.argv.iter().chain(&run.environment).map(|text| -> &OsStr { text }));
            }),
            2 => request::parse::<Bind>(&bytes).map(drop),
            _ => request::clones(&memory(&bytes)).map(drop),
        };
        match kept {
            Ok(()) => accepted += 1,
            Err(failure) => {
                assert!(failure.step.starts_with("request: "), "round {round}");
                refused += 1;
            }
        }
    }
    // Neither is all noise nor does everything pass.
    assert!(accepted > ROUNDS / 100 && refused > ROUNDS / 2, "{accepted} {refused}");
}

fn no_nul<'a>(texts: impl Iterator<Item = &'a OsStr>) {
    for text in texts {
        assert!(!text.as_encoded_bytes().contains(&0));
    }
}

#[test]
fn what_is_deep_or_long_is_refused() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}{}", open.repeat(500_000), close.repeat(500_000));
        assert!(request::parse::<Run>(deep.as_bytes()).is_err());
    }
    let many = vec![r#"{"path":"/usr","access":"read"}"#; 4097].join(",");
    let rule = r#"{"path":"/usr","access":"read"},{"path":"/tmp","access":"write"}"#;
    let long = PLAN.replace(rule, &many);
    assert_eq!(step(request::plan(&memory(long.as_bytes()))), "request: a list is too long");
    let twice = PLAN.replace("\"late\":false", "\"late\":false,\"late\":true");
    assert!(step(request::plan(&memory(twice.as_bytes()))).contains("duplicate field"));
}

#[test]
fn documents_that_are_no_documents_are_refused() {
    let huge = memory(b"");
    rustix::fs::ftruncate(&huge, 1 << 40).unwrap();
    assert_eq!(step(request::plan(&huge)), "request: request is too large");
    assert_eq!(step(request::filter(&huge)), "request: request is too large");
    let (pipe, _writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    let open = |path, flags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty());
    let others = [
        pipe,
        open("/", OFlags::RDONLY).unwrap(),
        open("/usr", OFlags::PATH).unwrap(),
        open("/dev/zero", OFlags::RDONLY).unwrap(),
        open("/dev/null", OFlags::WRONLY).unwrap(),
        socket().0,
    ];
    for other in others {
        assert!(request::plan(&other).is_err());
        assert!(request::clones(&other).is_err());
        assert!(request::document::<Run>(&[0], &mut vec![other]).is_err());
    }
    assert!(request::document::<Run>(&[0], &mut Vec::new()).is_err());
}

#[test]
fn a_seccomp_program_of_an_odd_length_is_refused() {
    // Each is refused before the kernel sees it.
    for length in [0, 1, 7, 9, 4095] {
        assert!(sys::load_filter(&vec![0; length], false).is_err());
    }
    assert!(request::filter(&memory(&vec![0; 4096 * 8 + 1])).is_err());
}

#[test]
fn datagrams_with_wrong_descriptors_or_sizes_are_refused() {
    let (ours, theirs) = socket();
    for count in [0, 1, 2, 63, 64, 70, 200, 253] {
        send(&ours, b"template", count);
        let (kind, descriptors) = receive::datagram(&theirs).unwrap().unwrap();
        assert_eq!((kind.as_slice(), descriptors.len()), (&b"template"[..], count));
        assert_eq!(receive::exactly::<2>(descriptors).is_ok(), count == 2);
    }
    // More bytes than there is room for: nothing of them counts but where the answer goes.
    send(&ours, &vec![b'x'; (8 << 10) + 1], 3);
    let (kind, descriptors) = receive::datagram(&theirs).unwrap().unwrap();
    assert_eq!((kind.as_slice(), descriptors.len()), (&b""[..], 1));
    drop(ours);
    assert!(receive::datagram(&theirs).unwrap().is_none());
}

fn socket() -> (OwnedFd, OwnedFd) {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    rustix::net::socketpair(family, kind, SocketFlags::CLOEXEC, None).unwrap()
}

fn send(socket: &OwnedFd, bytes: &[u8], count: usize) {
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let null = null.unwrap();
    let descriptors: Vec<BorrowedFd> = vec![null.as_fd(); count];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if count > 0 {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    let data = [IoSlice::new(bytes)];
    rustix::net::sendmsg(socket, &data, &mut ancillary, SendFlags::empty()).unwrap();
}

fn step<T>(result: Result<T, Failure>) -> String {
    result.map(drop).unwrap_err().step
}

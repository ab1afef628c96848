//! Step "template": a process that makes the sandboxes of one plan.
//!
//! It lives in a mount namespace whose root holds what all of its sandboxes see; each sandbox gets
//! a copy of that namespace and only what is private is mounted anew. The supervisor asks with one
//! byte and is handed a sandbox that waits to be told its program: the queue of the socket between
//! them is the pool of waiting sandboxes. Nothing is ever used twice; but the place of one that is
//! gone is filled again, where it was asked for so.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};

use crate::account::{Cgroups, Hierarchies};
use crate::report::{self, Failure, Message, Step};
use crate::request::{Layer, Network, Plan};
use crate::root::Root;
use crate::{account, confine, identity, init, receive, sys};

/// LIMIT: sandboxes of one template that live at the same time; root gives each its own uid.
const LIVING_MAX: u32 = 1024;
/// LIMIT: how long sandboxes may take to end; what lives after half of it is killed.
const ENDING_MAX: Duration = Duration::from_secs(3);
/// How long to wait until a busy cgroup is tried again.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// The namespaces a template of this plan is cloned into.
pub fn namespaces(plan: &Plan) -> u64 {
    if plan.has(Layer::Namespaces) {
        sys::CLONE_TEMPLATE
    } else {
        0
    }
}

/// Run as the template's process. Never returns.
pub fn run(plan: &Plan, filter: Vec<u8>, socket: &OwnedFd, launcher: &OwnedFd) -> ! {
    let ended = Template::build(plan, filter, socket, launcher).and_then(|mut template| {
        let served = template.serve();
        template.end();
        served
    });
    if let Err(failure) = ended {
        report::send(socket, &Message::Failed(&failure));
    }
    sys::leave(0)
}

/// What every sandbox of this template is made with.
pub struct Template<'a> {
    pub plan: &'a Plan,
    pub filter: Vec<u8>,
    pub socket: &'a OwnedFd,
    /// Tells that the launcher ends or is gone.
    launcher: &'a OwnedFd,
    pub lifeline: OwnedFd,
    /// Held open until this process ends; its closing tells every init to end.
    life: Option<OwnedFd>,
    pub as_root: bool,
    /// The host's procfs: names every process also where no other is mounted.
    pub proc: OwnedFd,
    pub root: Option<Root>,
    pub rules: confine::Rules<'a>,
    scratch: Option<OwnedFd>,
    hierarchies: Hierarchies<'a>,
    events: OwnedFd,
    living: HashMap<Pid, Living>,
    busy: Vec<String>,
    mappings: HashMap<u32, OwnedFd>,
    made: u64,
}

struct Living {
    slot: u32,
    /// Of its cgroups and its scratch folder.
    name: String,
    /// Another one is to be made when this one is gone.
    again: bool,
}

/// What the supervisor asks with: make one; and another whenever that one is gone.
const AGAIN: &[u8] = b"+";

/// One sandbox, as its init takes it over.
pub struct Birth {
    pub channel: OwnedFd,
    /// The stdin of a program that is given none. Flags and locks of an open file are of all that
    /// share it, so each sandbox has one of its own.
    pub null: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    pub cgroups: Cgroups,
    /// Host ids of this sandbox.
    pub uid: u32,
    pub gid: u32,
    pub mapping: Option<OwnedFd>,
    pub scratch: Option<OwnedFd>,
}

impl<'a> Template<'a> {
    fn build(
        plan: &'a Plan,
        filter: Vec<u8>,
        socket: &'a OwnedFd,
        launcher: &'a OwnedFd,
    ) -> Result<Self, Failure> {
        let own = [0, 1, 2, socket.as_raw_fd(), launcher.as_raw_fd()];
        sys::close_all_but(&own).step("close inherited descriptors")?;
        let (lifeline, life) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).step("lifeline")?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("pdeathsig")?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).step("subreaper")?;
        // What only the host's own tree shows, before it is left.
        let hierarchies = Hierarchies::open(&plan.cgroups)?;
        let proc = account::open_folder("/proc".as_ref())?;
        let scratch = plan.scratch.as_deref().map(account::open_folder).transpose()?;
        let as_root = identity::is_root();
        let mut mappings = HashMap::new();
        let root = if plan.has(Layer::Namespaces) {
            rustix::system::sethostname(b"safeconduct").step("sethostname")?;
            let mapping = identity::mapping_for(&proc, &plan.identity, plan.identity.uid)?;
            let root = Root::build(plan).map_err(Failure::or_stale)?;
            mappings.extend(mapping.map(|fd| (plan.identity.uid, fd)));
            Some(root)
        } else {
            None
        };
        let private = root.as_ref().map_or(&[][..], Root::private);
        let rules = confine::Rules::open(&plan.landlock, private).map_err(Failure::or_stale)?;
        Ok(Self {
            plan,
            filter,
            socket,
            launcher,
            lifeline,
            life: Some(life),
            as_root,
            proc,
            root,
            rules,
            scratch,
            hierarchies,
            events: sys::child_events().step("signalfd")?,
            living: HashMap::new(),
            busy: Vec::new(),
            mappings,
            made: 0,
        })
    }

    /// Make sandboxes until the supervisor closes its end.
    fn serve(&mut self) -> Result<(), Failure> {
        report::send(self.socket, &Message::Template);
        loop {
            let mut polled = [
                PollFd::new(self.socket, PollFlags::IN),
                PollFd::new(&self.events, PollFlags::IN),
                PollFd::new(self.launcher, PollFlags::IN),
            ];
            let timeout = (!self.busy.is_empty()).then_some(&RETRY);
            match rustix::event::poll(&mut polled, timeout) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Failure::new("poll", errno)),
            }
            let asked = !polled[0].revents().is_empty();
            if !polled[2].revents().is_empty() {
                return Ok(());
            }
            self.reap();
            if !asked {
                continue;
            }
            let Some((how, _)) = receive::datagram(self.socket)? else {
                return Ok(());
            };
            self.supply(how == AGAIN);
        }
    }

    /// End all sandboxes and remove what was made for them. What is stopped is killed.
    fn end(&mut self) {
        self.life = None;
        let begun = Instant::now();
        let mut patient = true;
        // An orphan whose parent dies comes to us only then: so until there is no child at all.
        while !(self.reap() && self.busy.is_empty()) {
            let waited = begun.elapsed();
            if waited > ENDING_MAX {
                return;
            }
            if patient && waited > ENDING_MAX / 2 {
                patient = false;
                for init in self.living.keys() {
                    let _ = rustix::process::kill_process(*init, Signal::KILL);
                }
            }
            let mut polled = [PollFd::new(&self.events, PollFlags::IN)];
            let _ = rustix::event::poll(&mut polled, Some(&RETRY));
        }
    }

    fn supply(&mut self, again: bool) {
        if let Err(failure) = self.make(again) {
            report::send(self.socket, &Message::Failed(&failure));
        }
    }

    /// Make one sandbox and hand it to the supervisor.
    fn make(&mut self, again: bool) -> Result<(), Failure> {
        self.made += 1;
        let number = self.made;
        let slot = self.free_slot()?;
        let (uid, gid) = (self.plan.identity.uid + slot, self.plan.identity.gid + slot);
        let (ours, channel) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .step("channel")?;
        let (read_out, stdout) = output_pipe().step("pipe")?;
        let (read_err, stderr) = output_pipe().step("pipe")?;
        let null = rustix::fs::open("/dev/null", OFlags::CLOEXEC, Mode::empty()).step("null")?;
        let mapping = self.mapping(uid)?;
        let scratch = self.make_scratch(number, uid, gid)?;
        let cgroups = self.hierarchies.make(&format!("{}-{number}", self.plan.name))?;
        let name = cgroups.name().to_owned();
        let birth = Birth {
            channel,
            null,
            stdout,
            stderr,
            cgroups,
            uid,
            gid,
            mapping,
            scratch: copy(scratch.as_ref().map(|(_, folder)| folder))?,
        };
        let cloned = sys::clone_into(self.namespaces(), birth.cgroups.birthplace());
        let pid = match cloned.step("clone namespaces") {
            Ok(None) => init::run(self, &birth),
            Ok(Some(pid)) => pid,
            Err(failure) => {
                self.hierarchies.remove(&name);
                return Err(failure);
            }
        };
        self.living.insert(pid, Living { slot, name, again });
        // Its number is not given to another process before `reap` has collected it.
        let init = rustix::process::pidfd_open(pid, PidfdFlags::empty()).step("pidfd")?;
        let message = Message::Sandbox {
            number,
            uid,
            again,
            scratch: scratch.as_ref().map(|(name, _)| name.as_str()),
        };
        let handed = [ours.as_fd(), read_out.as_fd(), read_err.as_fd(), init.as_fd()];
        report::send_with(self.socket, &message, &handed);
        Ok(())
    }

    /// Forget in a new init what belongs to the template or to other sandboxes: a copy of its
    /// socket or of the channel's other end would hide that they were closed.
    pub fn keep_only(&self, birth: &Birth) -> Result<(), Failure> {
        let own = [&birth.channel, &birth.stdout, &birth.stderr, &self.lifeline, &self.proc];
        let mut keep: Vec<_> = own.map(AsRawFd::as_raw_fd).to_vec();
        keep.extend([0, 1, 2, birth.null.as_raw_fd()]);
        keep.extend(birth.cgroups.folders.iter().map(AsRawFd::as_raw_fd));
        keep.extend(birth.mapping.iter().map(AsRawFd::as_raw_fd));
        keep.extend(birth.scratch.iter().map(AsRawFd::as_raw_fd));
        keep.extend(self.rules.descriptors());
        sys::close_all_but(&keep).step("close inherited descriptors")
    }

    fn namespaces(&self) -> u64 {
        match (self.plan.has(Layer::Namespaces), self.plan.network) {
            (false, _) => 0,
            (true, Network::Shared) => sys::CLONE_SANDBOX,
            (true, Network::Own) => sys::CLONE_SANDBOX | sys::CLONE_NEWNET,
        }
    }

    /// Root gives every living sandbox ids of its own; an ordinary user has but one.
    fn free_slot(&self) -> Result<u32, Failure> {
        if !self.as_root {
            return Ok(0);
        }
        (0..LIVING_MAX)
            .find(|slot| !self.living.values().any(|living| living.slot == *slot))
            .ok_or(Failure::new("too many living sandboxes", Errno::AGAIN))
    }

    fn mapping(&mut self, uid: u32) -> Result<Option<OwnedFd>, Failure> {
        if !self.mappings.contains_key(&uid) {
            let made = identity::mapping_for(&self.proc, &self.plan.identity, uid)?;
            self.mappings.extend(made.map(|fd| (uid, fd)));
        }
        copy(self.mappings.get(&uid))
    }

    fn make_scratch(
        &self,
        number: u64,
        uid: u32,
        gid: u32,
    ) -> Result<Option<(String, OwnedFd)>, Failure> {
        let Some(base) = &self.scratch else {
            return Ok(None);
        };
        let name = format!("{}-{number}", self.plan.name);
        rustix::fs::mkdirat(base, name.as_str(), Mode::RWXU).step("make scratch")?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder =
            rustix::fs::openat(base, name.as_str(), flags, Mode::empty()).step("open scratch")?;
        if self.as_root {
            let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
            let flags = rustix::fs::AtFlags::EMPTY_PATH;
            rustix::fs::chownat(&folder, "", Some(uid), Some(gid), flags).step("own scratch")?;
        }
        Ok(Some((name, folder)))
    }

    /// Collect dead inits and remove what was made for them. An init that died by a signal without
    /// a pid namespace leaves orphans, which the kernel gave to us, prctl(2)
    /// PR_SET_CHILD_SUBREAPER: end them. Tells whether no child is left.
    fn reap(&mut self) -> bool {
        receive::drain(&self.events);
        let mut lost = false;
        let mut again = Vec::new();
        let alone = loop {
            let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some(ended)) => ended,
                other => break matches!(other, Err(Errno::CHILD)),
            };
            lost |= status.terminating_signal().is_some();
            if let Some(living) = self.living.remove(&pid) {
                // Empty where it was never used; otherwise the supervisor removes it.
                if let Some(base) = self.scratch.as_ref().filter(|_| self.life.is_none()) {
                    let _ = rustix::fs::unlinkat(base, &*living.name, AtFlags::REMOVEDIR);
                }
                self.busy.push(living.name);
                if living.again && self.life.is_some() {
                    again.push(status.exit_status() == Some(0));
                }
            } else {
                lost = true; // an orphan, whose own children are orphans now
            }
        };
        if (lost || self.life.is_none()) && !self.plan.has(Layer::Namespaces) {
            self.end_orphans();
        }
        let hierarchies = &self.hierarchies;
        self.busy.retain(|name| !hierarchies.remove(name));
        for well in again {
            if well {
                self.supply(true);
            } else {
                // What failed or was killed may do so again at once, and for ever.
                let failure = Failure::new("sandbox", Errno::CHILD);
                report::send(self.socket, &Message::Failed(&failure));
            }
        }
        alone
    }

    fn end_orphans(&self) {
        let path = format!("{}/task/{0}/children", rustix::process::getpid());
        let Ok(children) = identity::read_proc(&self.proc, &path) else {
            return;
        };
        let strangers = children
            .split_ascii_whitespace()
            .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
            .filter(|pid| !self.living.contains_key(pid));
        for orphan in strangers {
            let _ = rustix::process::kill_process(orphan, Signal::KILL);
        }
    }
}

/// A pipe whose reader never waits; its writer does.
fn output_pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&reader, rustix::fs::OFlags::NONBLOCK)?;
    Ok((reader, writer))
}

fn copy(fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, Failure> {
    fd.map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 3)).transpose().step("copy descriptor")
}

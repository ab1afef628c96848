//! Step "request": datagrams and the descriptors that come along with them, unix(7).

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use crate::report::Failure;

/// LIMIT: descriptors of one datagram; SCM_MAX_FD, unix(7).
const DESCRIPTORS_MAX: usize = 253;
/// LIMIT: bytes of one datagram; what is longer comes in a memfd.
const DATAGRAM_BYTES_MAX: usize = 8 << 10;

/// Bytes, and the descriptors that came along.
pub type Datagram = (Vec<u8>, Vec<OwnedFd>);

/// Receive one datagram; `None` at end of file.
pub fn datagram(socket: &OwnedFd) -> Result<Option<Datagram>, Failure> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0_u8; DATAGRAM_BYTES_MAX];
    let mut data = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket.as_fd(), &mut data, &mut ancillary, flags)
    });
    let received = match received {
        Ok(received) => received,
        Err(Errno::CONNRESET) => return Ok(None),
        Err(errno) => return Err(Failure::new("receive request", errno)),
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    // Cut short where this process has no room for more: a call never runs with a part of them.
    if received.flags.contains(ReturnFlags::CTRUNC) || received.flags.contains(ReturnFlags::TRUNC) {
        descriptors.truncate(1);
        return Ok(Some((Vec::new(), descriptors)));
    }
    Ok(Some((bytes[..received.bytes].to_vec(), descriptors)))
}

/// Demand that exactly so many descriptors came along.
pub fn exactly<const COUNT: usize>(descriptors: Vec<OwnedFd>) -> Result<[OwnedFd; COUNT], Failure> {
    <[OwnedFd; COUNT]>::try_from(descriptors)
        .map_err(|_| Failure::protocol("not the descriptors that belong to this request"))
}

/// Empty a descriptor that only tells that something happened.
pub fn drain(events: &OwnedFd) {
    let mut buffer = [0_u8; 1024];
    while rustix::io::read(events, &mut buffer).is_ok() {}
}

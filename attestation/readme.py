"""Step "record": the README inside every trace, for a stranger who has nothing else."""

from __future__ import annotations

_TEXT = """\
This folder is a trace: a record of the tool calls of an AI agent, kept by Safeconduct.
The log in it calls itself: {origin}

What is here
  checkpoint          the signed head of the log: its name, its length, its Merkle root
  checkpoints/<size>  earlier signed heads
  tile/entries/...    the records, 256 to a file, each behind a 16-bit big-endian length
  tile/<L>/...        the Merkle tree over them, 256 hashes to a file
  journal/            records too new to be signed; empty when the log was closed
  openings/, blobs/   what the salted commitments in the records stand for; PRIVATE.
                      Leave out openings/, blobs/ and journal/ when you hand the folder on;
                      everything else still verifies.

How to check it
  You need the operator's public key line, from the operator, not from this folder:
  a key that came along with a log proves nothing about it. The line reads name+hash+base64.
  Then run, on any machine with Safeconduct installed, or with its verifier alone:

    safeconduct trace verify --key 'NAME+HASH+BASE64' THIS-FOLDER
    safeconduct-verify --key 'NAME+HASH+BASE64' THIS-FOLDER

  It prints what was checked and what was not, and exits with 0 (good), 10 (tampered with),
  11 (incomplete), 12 (trust not established) or 13 (unreadable).

How to check it with other people's tools
  The layout is C2SP tlog-tiles and the head is a C2SP tlog-checkpoint (https://c2sp.org/).
  Any client of those can read this folder, as files or served over HTTP as they are:
  1. take the text of `checkpoint` up to and including the last newline before the empty line,
     and verify one Ed25519 signature over it: on the line that starts with an em dash and the
     log's name, decode the base64 and skip 4 bytes (the key's id);
  2. leaf hash = SHA-256(0x00 || record), node = SHA-256(0x01 || left || right) (RFC 6962);
     the root over the first <size> records must be the third line of the checkpoint;
  3. each record is JSON; docs/trace-format.md of Safeconduct describes it.

What it cannot show
  That nothing was left out before it was recorded, that the operator's machine was honest,
  or that no later records were cut off: hold a checkpoint you kept against it (--checkpoint).
"""


def readme(origin: str) -> bytes:
    """Return the README of a trace."""
    return _TEXT.format(origin=origin).encode()

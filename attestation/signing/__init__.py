"""The signer: a process of its own with the key, and what keeps that key."""

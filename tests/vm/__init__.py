"""Test machines: stock kernels under QEMU, with the root of this machine inside."""

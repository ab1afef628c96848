"""The runtime: the path of one Call, the sandboxes it runs in, and the ways in."""

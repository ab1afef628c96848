"""Sandboxes: what a Call can see, what it can use, and how it is ended."""

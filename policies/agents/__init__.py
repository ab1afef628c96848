"""What hosts call their tools, and which of ours each one is."""

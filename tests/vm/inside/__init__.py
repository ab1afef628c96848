"""What runs inside a test machine."""

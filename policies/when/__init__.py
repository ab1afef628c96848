"""Conditions of rules: a small, total expression language over a Call and its session."""

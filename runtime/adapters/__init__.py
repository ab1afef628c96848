"""Adapters: how Calls of other programs reach the pipeline."""

"""Rows to examples: read, render, mark the supervised tokens, pack."""

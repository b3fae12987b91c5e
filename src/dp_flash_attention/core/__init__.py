"""Errors, validation and privacy types. Standard library only."""

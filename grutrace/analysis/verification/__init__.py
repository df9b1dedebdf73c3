"""Verify recorded gates against the equations, and store derived ones."""

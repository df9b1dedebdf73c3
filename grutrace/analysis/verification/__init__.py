"""Verify recorded gates against the equations, and store deferred ones."""

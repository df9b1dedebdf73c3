"""Recorded gates checked against the equations, and computed ones stored."""

"""Selections: traces that contain some sequences of another trace."""

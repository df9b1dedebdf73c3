"""Runs that are killed, lose their disk or their power, and are followed while they go on.

The tests use it for a minute; ``python -m tests.soak --help`` says how to use it for longer.
"""

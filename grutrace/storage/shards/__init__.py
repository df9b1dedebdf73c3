"""Traces of several files: ranks of one run, parts of one run, and merged files."""

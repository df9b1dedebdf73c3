"""Traces and results of analyses as pictures and pages."""

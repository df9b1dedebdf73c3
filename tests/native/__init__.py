"""Tests of the compiled part."""

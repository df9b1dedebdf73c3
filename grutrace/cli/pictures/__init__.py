"""Commands that show traces as pictures and pages."""

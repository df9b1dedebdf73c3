"""What can be read of a damaged trace, and copied out of it."""

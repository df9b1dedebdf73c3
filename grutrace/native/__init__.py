"""The compiled part: loops in C over the bytes of a call, called by address through ctypes."""

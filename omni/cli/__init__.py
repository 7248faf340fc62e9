"""The command `omni`."""

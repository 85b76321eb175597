"""A federation of separate processes on one machine, over FLARE's POC mode."""

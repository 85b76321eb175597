"""Everything that touches NVIDIA FLARE: what a job's configuration names, and the simulator."""

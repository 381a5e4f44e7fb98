"""Plans of 8B to 671B bases on 1 to 1,024 GPUs, and a simulation of their gathers."""

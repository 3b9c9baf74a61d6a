"""Sweeps that have accidents: every fault of the matrix on a real Ray of this machine, then one resume, then the invariants. `make faults` runs all of them."""

"""Launchers of the Triton kernels in vapt_fast.kernels: they allocate and launch, nothing else."""

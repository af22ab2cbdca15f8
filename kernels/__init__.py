"""Triton kernels, in files named as their ops: only @triton.jit functions. vapt_fast.ops launches them."""

if __name__ == "kernels":
    raise ImportError("this folder is packaged as vapt_fast.kernels; `kernels` is another project's package")

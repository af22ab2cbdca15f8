"""Triton kernels, one op a file: only @triton.jit functions. vapt_fast.backends.triton launches them."""

if __name__ == "kernels":
    raise ImportError("this folder is packaged as vapt_fast.kernels; `kernels` is another project's package")

"""Triton kernels, one op a file: only @triton.jit functions, which vapt_fast/ops/*/triton.py launch."""

if __name__ == "kernels":
    raise ImportError("this folder is packaged as vapt_fast.kernels; `kernels` is another project's package")

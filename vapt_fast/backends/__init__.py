"""Implementations of the ops of vapt_fast.functional, one folder a backend; they never import each other."""

"""The ops that are benchmarked, a module each.

A module has:

- ``job(sizes, num_prompts)``: the inputs, the definition and the least work.
- ``RIVALS``: names; "NAME, compiled" is the implementation NAME, compiled.
- ``implementation(name, sizes)``: what is measured.
- ``PROMPTS``: whether its sizes depend on the number of prompts.
"""

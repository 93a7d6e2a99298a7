"""The statements behind specdef_jax, each a module that a reader reads and a machine checks.

A module's docstring holds statement, assumptions, proof, source and standing; its certify(key, size)
evaluates both sides on instances and returns certificates. `python -m theory` runs them all.
"""

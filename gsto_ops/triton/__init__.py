"""The operators in Triton: one module each with ``forward`` and ``backward``, over a few shared kernels.

The operators' modules need triton, which this package does not import by itself; ``configs`` and ``tuning`` do without.
"""

"""The mathematics: one Adadelta update (Zeiler, 2012, arXiv:1212.5701), stated once and implemented three times.

    reference   numpy, float64: reads like the equations
    cpu         numba, float32: one fused pass over host memory
    cuda        torch tensors and one fused Triton kernel, float32: the same bits as `cpu`
    values      numba: validates a gradient, fingerprints it and measures its norm, in one pass
    formats     numpy: the element types that values arrive in, float32 and two of 16 bits
    float16     numba: float16 and bfloat16 in the kernels, and weights rounded to them
    robust      numpy: the trimmed mean, which a few malicious gradients cannot move far

The package imports none of these modules by itself: a CPU server loads neither torch nor Triton, and code that needs
only `Hyperparameters` does not load numba.
"""

from deltaserve_server.adadelta.hyperparameters import Hyperparameters

__all__ = ["Hyperparameters"]

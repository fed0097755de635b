"""The mathematics: one Adadelta update (Zeiler, 2012, arXiv:1212.5701), stated once and implemented three times.

    reference   numpy, float64: reads like the equations
    cpu         numba, float32: one fused pass over host memory
    cuda        torch tensors and one fused Triton kernel, float32: the same bits as `cpu`
    values      numba: what admission must know of a gradient, in one pass
    formats     numpy: float32, and the formats of 16 bits in which values may travel
    halves      numba: those formats in the kernels, and weights rounded to them
    robust      numpy: means of gradients that a few liars cannot move far

Each is imported by who needs it: a CPU server loads neither torch nor Triton, a client neither those nor numba.
"""

from deltaserve_server.adadelta.hyperparameters import Hyperparameters

__all__ = ["Hyperparameters"]

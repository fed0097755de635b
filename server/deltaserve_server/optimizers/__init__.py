"""The mathematics: the update of one element, stated once and evaluated by kernels for the CPU and for the GPU.

    reference   numpy, float64: one function for each optimizer, in the letters of its paper
    cpu         numba, float32: one fused pass over host memory
    cuda        torch tensors and one fused Triton kernel, float32: the same bits as `cpu`; `triton_source` writes it
    values      numba: validates a gradient, fingerprints it and measures its norm, in one pass
    formats     numpy: the element types that values arrive in, float32 and two of 16 bits
    float16     numba: float16 and bfloat16 in the kernels, and weights rounded to them
    trace       the update of an optimizer as a list of operations, for text that is generated from it
    robust      numpy: the trimmed mean, which a few malicious gradients cannot move far

The definitions of the optimizers are in `deltaserve._common.optimizers`, because clients need them too.

The package imports none of these modules by itself: a CPU server loads neither torch nor Triton, and code that needs
no kernels does not load numba.
"""

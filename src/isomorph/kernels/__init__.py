"""Products with weights in MLX's packed layout, read as they lie.

    csrc/          the C++ extension `_native`: AVX-512, AVX2, NEON and plain C++, chosen at run time
    extension.py   finds the extension; quantizing needs it without torch
    native.py      gives it torch's threads; the thinnest possible calls into it
    reference.py   the same products in plain torch: any device, and where there is no extension
    ops.py         all of them as torch operators `torch.ops.isomorph.*`, with shapes for torch.compile
    modules.py     QuantizedLinear, QuantizedEmbedding, QuantizedExperts

`exact` numerics: integer codes times the activations as given, fp32 accumulation; |y - y_fp64| <= 1e-6 * sum|x * w|.
`fast`: activations rounded to int8 within each group (scale max|x| / 127), which is where its whole error comes from.
"""

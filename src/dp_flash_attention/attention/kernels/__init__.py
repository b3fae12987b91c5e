"""DP attention as Triton kernels. Needs triton; imported only where the back end is asked for.

``row_factors.py`` clips rows, ``accumulate.py`` and ``epilogue.py`` are what the attention kernels are made of:
``forward.py`` for all rows at once, ``split.py`` for ranges of rows, ``backward.py`` for gradients. ``launch*.py`` run them on
tensors, ``differentiable.py`` joins both passes, ``backend.py`` is the back end. The design and what is verified of it:
``docs/kernels.md``.
"""

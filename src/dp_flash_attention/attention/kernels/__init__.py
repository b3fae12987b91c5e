"""DP attention as Triton kernels. Needs triton; imported only where the back end is asked for.

``row_factors.py`` clips rows, ``forward.py`` is the attention kernel, ``launch.py`` runs both on tensors, ``backend.py``
is the back end. The design and what is verified of it: ``docs/kernels.md``.
"""

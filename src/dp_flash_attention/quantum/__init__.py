"""Mechanisms whose guarantee outlives today's cryptography, and the checks that try to refute them.

What is checked is in ``evidence`` and ``verification``; a subject's checks are one file under ``checks``.
"""

"""The checks of ``dpfa verify``, one file a subject.

Each file has one function ``<subject>_checks(*, deep)`` that returns ``NamedCheck`` pairs; the list of
subjects is in ``verification``.
"""

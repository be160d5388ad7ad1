"""A page that compares runs of ``gateloop train``: ``python -m gateloop_cpp.report``."""

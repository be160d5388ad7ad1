"""A page that compares runs of ``gateloop train``: ``gateloop report``."""

"""The verbs as functions of the library: one module per verb.

This file stays empty of imports, because every worker process imports ``pipeline.units``.
"""

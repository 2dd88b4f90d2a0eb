"""Serving: a service over HTTP with micro-batches, budgets of time, and recommendations in bulk.

``lcr_fast.export`` makes programs for other engines; docs/serving.md says what to use when.
"""

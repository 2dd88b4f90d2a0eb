"""Experiments: whole jobs on top of training, with tables and plots."""

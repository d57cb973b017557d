"""Whole studies: pipeline, report, tables."""

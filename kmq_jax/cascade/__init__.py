"""Multi-precision cascades: policy, gates, risk control, runs, verification."""

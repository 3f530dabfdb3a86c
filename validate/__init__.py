"""Whether a compiled artifact may replace its teacher: parity, quality, calibration, latency, gates, report."""

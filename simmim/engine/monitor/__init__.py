"""Metrics, trackers, progress, anomalies, utilisation."""

"""Figures of merit for detection and calibration, with their uncertainty."""

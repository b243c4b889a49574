"""The calibration stage."""

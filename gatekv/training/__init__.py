"""Training gates inside a frozen model: data, losses, objective, loop, calibration."""

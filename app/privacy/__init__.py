"""Pure arithmetic of differential privacy: plans, events, accountants, calibration, the budget's filter. No I/O."""

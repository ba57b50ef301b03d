"""Floor 2: functions of arrays; no parameters, no configuration."""

"""Where side effects live: devices, files, metrics, signals."""

"""Several processes: launching, FSDP2, stop signals and watchdog."""

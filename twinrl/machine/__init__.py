"""The machine under a run: memory, files and locks, models that visit the device, versions that differ, Ray."""

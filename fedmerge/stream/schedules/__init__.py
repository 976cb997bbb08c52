"""Stream schedules: one file each."""

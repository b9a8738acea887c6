"""The flow and its rows: path, times, draws, conditions, branches, guidance, teachers, schedules, data's contracts."""

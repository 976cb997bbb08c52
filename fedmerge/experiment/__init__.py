"""An experiment from YAML to report: read, check, plan, run, sweep, diagnose."""

"""Attacks of simulated attackers: one file each."""

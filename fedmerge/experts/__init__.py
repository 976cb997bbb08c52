"""Experts: how a hospital trains one, what may leave the site, and where it is kept."""

"""Where experts lie in weight space: drift from theta_0, and barriers between them."""

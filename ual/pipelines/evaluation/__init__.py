"""Models x tasks, from configuration to figures (`ual evaluate`)."""

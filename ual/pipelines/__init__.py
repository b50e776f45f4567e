"""What each command does, from configuration to folder."""

"""The papers' mathematics: pure functions of arrays."""

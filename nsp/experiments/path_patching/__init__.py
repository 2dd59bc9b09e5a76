"""Path patching: from a sender to a receiver, with everything between them frozen."""

"""An alignment scan: neurons that fire on one set of prompts and not on another."""

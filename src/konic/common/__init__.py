"""Kept for the import path konic.common.errors of konic 0.1."""

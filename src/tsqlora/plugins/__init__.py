"""Plugins of other trainers: thin, each against its interface."""
